"""Generation with a key/value cache is the argmax of full forward passes; sampling keeps to its top-k and top-p."""

import torch

from megacode.evaluate.generate import Sampling, continue_tokens, next_token
from megacode.recipe.schema import Model
from tests.model.test_transformers_parity import VOCAB, small
from tests.processes import run_on


def cached_and_full(world, model: Model):
    from megacode.model.gpt import build_model

    torch.manual_seed(0)
    (chunk,) = build_model(small(model), VOCAB)
    chunk.eval()
    prompt = [5, 17, 900, 3]
    cached = list(continue_tokens(chunk, prompt, 12, None, Sampling(), VOCAB))
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            positions = torch.arange(len(tokens))[None]
            tokens.append(int(chunk(torch.tensor([tokens]), positions, None)[0, -1, :VOCAB].argmax()))
    stopped = list(continue_tokens(chunk, prompt, 12, cached[3], Sampling(), VOCAB))
    return cached, tokens[len(prompt) :], stopped


def test_cached_generation_equals_full_passes_and_stops() -> None:
    model = Model(layers=3, hidden_size=64, heads=4, kv_heads=2, init_std=0.2)
    ((cached, full, stopped),) = run_on(1, cached_and_full, model)
    assert cached == full and len(set(cached)) > 3
    assert stopped == cached[: cached.index(cached[3])]


def test_sampling_keeps_to_the_likeliest() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    assert {next_token(logits, Sampling(1.0, top_k=2), generator) for _ in range(200)} == {1, 2}
    assert {next_token(logits, Sampling(1.0, top_p=0.5), generator) for _ in range(200)} == {1}
    assert next_token(logits, Sampling(), generator) == 1
