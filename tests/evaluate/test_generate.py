"""Generation with a key/value cache is the argmax of full forward passes; sampling keeps to its top-k and top-p."""

import argparse
import io
from pathlib import Path

import pytest
import sentencepiece
import torch

from megacode.cli.generate import prompts_of
from megacode.cli.main import main
from megacode.errors import UserError
from megacode.evaluate.generate import (
    Sampling,
    continuation,
    continue_tokens,
    infill_prompt,
    next_token,
)
from megacode.recipe import schema
from megacode.recipe.schema import Model, RotaryScaling
from megacode.tokenizer.tokenizer import load_tokenizer
from tests.megatron.test_transformers_parity import LENGTH, VOCAB, small
from tests.processes import run_on
from tests.tokenizer.test_tokenizer import CORPUS


def cached_and_full(world, model: Model):
    from megacode.megatron.model import build_model

    torch.manual_seed(0)
    (chunk,) = build_model(small(model), VOCAB)
    chunk.eval()
    prompt = [5, 17, 900, 3]
    cached = list(continue_tokens(chunk, prompt, 12, (), Sampling(), VOCAB))
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            positions = torch.arange(len(tokens))[None]
            tokens.append(
                int(chunk(torch.tensor([tokens]), positions, None)[0, -1, :VOCAB].argmax())
            )
    stopped = list(continue_tokens(chunk, prompt, 12, [cached[3]], Sampling(), VOCAB))
    return cached, tokens[len(prompt) :], stopped


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"sliding_window": 5},
        {"sliding_window": 5, "sliding_window_pattern": 2, "no_rope_layer_interval": 3},
        {"rotary_scaling": RotaryScaling(kind="yarn", factor=4.0, original_context_length=64)},
    ],
    ids=" ".join,
)
def test_cached_generation_equals_full_passes_and_stops(keys: dict) -> None:
    model = Model(layers=3, hidden_size=64, heads=4, kv_heads=2, init_std=0.2, **keys)
    ((cached, full, stopped),) = run_on(1, cached_and_full, model)
    assert cached == full and len(set(cached)) > 3
    assert stopped == cached[: cached.index(cached[3])]


def test_sampling_keeps_to_the_likeliest() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    assert {next_token(logits, Sampling(1.0, top_k=2), generator) for _ in range(200)} == {1, 2}
    assert {next_token(logits, Sampling(1.0, top_p=0.5), generator) for _ in range(200)} == {1}
    assert next_token(logits, Sampling(), generator) == 1


@pytest.fixture(scope="module")
def blank_first(tmp_path_factory: pytest.TempPathFactory) -> schema.TokenizerSection:
    """As Llama 2's: encoding puts a blank before a text, and decoding takes the first one away."""
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=420, byte_fallback=True,
        add_dummy_prefix=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return schema.TokenizerSection(path=str(path), added_tokens="crystal", bos=True)


def asked(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"prompt": [], "prefix": None, "suffix": None, "tokens": 8} | given)


def test_what_is_written_goes_on_after_the_prompt(blank_first: schema.TokenizerSection) -> None:
    tokenizer = load_tokenizer(blank_first)
    recipe = small(Model(layers=1, hidden_size=64, heads=4)).model_copy(
        update={"tokenizer": blank_first}
    )
    plain, gap = prompts_of(asked(prompt=["def é"], prefix="x =", suffix="y"), recipe, tokenizer)
    assert plain.tokens == [tokenizer.bos_id, *tokenizer.encode("def é")]
    assert gap.tokens == infill_prompt(recipe, tokenizer, "x =", "y")
    for prompt in (plain, gap):
        whole = tokenizer.encode(f"{prompt.before} the é")
        written = whole[len(tokenizer.encode(prompt.before)) :]
        assert tokenizer.decode(written) == "the é"
        assert continuation(tokenizer, prompt.context, written) == " the é"
        half = tokenizer.encode("\U0001f600")[-4:-2]
        assert continuation(tokenizer, prompt.context, half).strip("\ufffd") == ""


def test_no_more_positions_than_were_learned(blank_first: schema.TokenizerSection) -> None:
    model = Model(layers=1, hidden_size=64, heads=4, position_embedding="learned")
    recipe, tokenizer = (
        small(model).model_copy(update={"tokenizer": blank_first}),
        load_tokenizer(blank_first),
    )
    many = LENGTH - len(tokenizer.encode("def")) - 1  # and BOS
    for tokens in (many, many + 1):
        prompts_of(asked(prompt=["def"], tokens=tokens), recipe, tokenizer)
    with pytest.raises(
        UserError, match=f"--tokens {many + 2}: .* more than the {LENGTH} positions"
    ):
        prompts_of(asked(prompt=["def"], tokens=many + 2), recipe, tokenizer)
    rotary = recipe.model_copy(
        update={"model": model.model_copy(update={"position_embedding": "rotary"})}
    )
    prompts_of(asked(prompt=["def"], tokens=many + 2), rotary, tokenizer)


def test_sampling_that_cannot_be_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value, expected in (
        ("tokens", "0", "1 or more"),
        ("temperature", "-1", "0 or more"),
        ("temperature", "nan", "0 or more"),
        ("top-k", "-1", "0 or more"),
        ("top-p", "0", "more than 0 and at most 1"),
        ("top-p", "1.5", "more than 0 and at most 1"),
    ):
        assert main(["generate", str(tmp_path), "--prompt", "a", f"--{option}={value}"]) == 2
        assert f"--{option}: expected {expected}, not " in capsys.readouterr().err
