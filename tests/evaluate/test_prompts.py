"""What a model goes on from: prompts that fit, and prompts that are filled in before a suffix."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megacode.evaluate.scoring import _prompt
from megacode.evaluate.tasks import GenerationItem
from megacode.recipe import schema
from megacode.tokenizer.tokenizer import load_tokenizer
from megacode.tokenizer.training import write_byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("bytes") / "bytes.json"
    write_byte_tokenizer(path)
    section = schema.TokenizerSection(path=str(path), added_tokens="crystal", eod=True)
    data = SimpleNamespace(fim=schema.FimSection())
    return SimpleNamespace(
        bos=False, tokenizer=load_tokenizer(section), recipe=SimpleNamespace(data=data)
    )


def item(prompt: str, suffix: str | None) -> GenerationItem:
    return GenerationItem(prompt, "", "", suffix, "", "")


def test_a_suffix_stands_behind_its_token_and_the_middle_is_asked_for(model: Any) -> None:
    ids, cut = _prompt(model, item("ab", "cd"), 99)
    names = {i: name for name, i in model.tokenizer.control_tokens.items()}
    shown = "".join(names.get(i) or model.tokenizer.decode([i]) for i in ids)
    assert shown == "<|fim_prefix|>ab<|fim_suffix|>cd<|fim_middle|>" and not cut


@pytest.mark.parametrize(
    ("prompt", "suffix", "kept"),
    [("abcdef", None, "cdef"), ("abcdef", "x", "defx"), ("abcdef", "uvwxyz", "efuv")],
)
def test_what_is_too_long_loses_what_is_far(
    model: Any, prompt: str, suffix: str | None, kept: str
) -> None:
    room = len(kept) + (0 if suffix is None else 3)  # with the tokens around
    ids, cut = _prompt(model, item(prompt, suffix), room)
    assert cut and len(ids) == room and model.tokenizer.decode(ids) == kept
