"""Logically equivalent code selection (arXiv 2404.08885): which of two candidates computes what the
query does?

The study scores by similarity of sentence embeddings. Likelihood and a prompt are here beside it:
they ask whether a model that cannot tell by one can tell by another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from megacode.evaluate.likelihood import encode_pair, log_likelihoods, text_batches
from megacode.evaluate.model import LoadedModel
from megacode.evaluate.tasks import Lecs, LecsItem
from megacode.megatron.scoring import embed_tokens
from megacode.recipe.schema import Contrastive
from megacode.recipe.schema_objective import Pooling


def similarities(
    model: LoadedModel, how: Lecs, items: Sequence[LecsItem]
) -> tuple[list[tuple[float, float]], int]:
    """Of each item what the equivalent candidate scores and what the other one; how many texts lost
    their end (or beginning) because they are longer than the model's context. Collective."""
    wanted = dict.fromkeys(
        (item.query, candidate) for item in items for candidate in (item.equivalent, item.other)
    )
    pairs = list(wanted)
    if how.score == "embedding":
        found, cut = _by_embedding(model, how, pairs)
    else:
        found, cut = _by_likelihood(model, how, pairs)
    values = dict(zip(pairs, found, strict=True))
    return [
        (values[item.query, item.equivalent], values[item.query, item.other]) for item in items
    ], cut


def embeddings(
    model: LoadedModel, texts: Sequence[str], pooling: Pooling, layer: int | Literal["last"]
) -> tuple[torch.Tensor, int]:
    """float32 `[texts, hidden]`, equal on every rank, and how many texts lost their end. A text's
    tokens begin with BOS where the recipe's documents do. Collective."""
    start = [model.tokenizer.bos_id] if model.bos else []
    ids = [[*start, *model.tokenizer.encode(text)] or [model.tokenizer.eod_id] for text in texts]
    kept = [one[: model.context_length] for one in ids]
    how = Contrastive(pooling=pooling, layer=layer)
    sums = torch.zeros(len(texts), model.recipe.model.hidden_size, device=model.world.device)
    for part in text_batches(model, kept):
        sums += embed_tokens(model.chunks, part, len(texts), how, model.world)
    torch.distributed.all_reduce(sums)
    counts = [len(one) if pooling == "mean" else 1 for one in kept]
    cut = sum(len(one) > model.context_length for one in ids)
    return sums / torch.tensor(counts, device=sums.device)[:, None], cut


def _by_embedding(
    model: LoadedModel, how: Lecs, pairs: Sequence[tuple[str, str]]
) -> tuple[list[float], int]:
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    vectors, cut = embeddings(model, texts, how.pooling, how.layer)
    place = {text: number for number, text in enumerate(texts)}
    unit = torch.nn.functional.normalize(vectors, dim=-1).double()
    query, candidate = (unit[[place[pair[i]] for pair in pairs]] for i in (0, 1))
    return (query * candidate).sum(1).tolist(), cut


def _by_likelihood(
    model: LoadedModel, how: Lecs, pairs: Sequence[tuple[str, str]]
) -> tuple[list[float], int]:
    if how.score == "likelihood":
        texts = [(f"{query}\n\n", candidate) for query, candidate in pairs]
    else:
        prompts = [
            how.prompt.replace("{query}", query).replace("{candidate}", candidate)
            for query, candidate in pairs
        ]
        texts = [(prompt, label) for prompt in prompts for label in how.labels]
    encoded = [encode_pair(model.tokenizer, model.bos, *text) for text in texts]
    cut = sum(len(a) + len(b) - 1 > model.context_length for a, b in encoded)
    found = log_likelihoods(model, encoded)
    if how.score == "likelihood":
        return [one.log_likelihood / max(one.tokens, 1) for one in found], cut
    each = [one.log_likelihood for one in found]
    return [yes - no for yes, no in zip(each[::2], each[1::2], strict=True)], cut
