"""Laws of encoding only what is near the cuts: the same text always, and the tokens of encoding it all."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.data import fim_near
from megacode.data.fim import Fim, make_fim, rearrange_rows
from megacode.data.fim_near import MIN_TOKENS
from megacode.data.permute import uniform_bits
from megacode.recipe import schema
from tests.data.test_fim import CODE, TEXT, trained, undo

WORDS = [
    "def",
    "return",
    "  ",
    "\n",
    "\n\n    ",
    " x",
    "==",
    "======",
    "lorem",
    " ipsum",
    "\t",
    "(",
    ")",
    ":",
    "aaaa",
    " ",
]


@pytest.fixture(scope="module", params=["ours", "llama", "bytes"])
def fim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fim:
    made = make_fim(schema.FimSection(), trained(tmp_path_factory.mktemp("t"), request.param))
    return replace(made, spm_rate=0.0)


def both(fim: Fim, ids: list[int], key: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prefix, middle and suffix by the short way and by the long way (which a sample's edge takes)."""
    found = []
    for edges in ("none", "outer"):
        (new,) = rearrange_rows(
            fim, [np.array(ids)], uniform_bits(key, np.arange(1)), np.ones(1), [edges]
        )
        assert new is not None
        found.append(undo(fim, new) or [])
    return found[0], found[1]


@settings(max_examples=150, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=400), first=st.sampled_from(["x", " x", "  x", "\n"]),
       key=st.integers(0, 2**60))  # fmt: skip
def test_the_text_of_every_piece_is_that_of_the_long_way(
    fim: Fim, words: list[str], first: str, key: int
) -> None:
    near, whole = both(fim, fim.tokenizer.encode(first + "".join(words)), key)
    assert [fim.decode(piece) for piece in near] == [fim.decode(piece) for piece in whole]


def test_real_code_has_the_tokens_of_encoding_all_of_it(
    fim: Fim, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:30]
    encoded = []
    original = type(fim.tokenizer).encode_batch

    def counted(self: object, texts: list[str]) -> list[list[int]]:
        encoded.append(sum(map(len, texts)))
        return original(self, texts)  # type: ignore[arg-type]

    documents = [fim.tokenizer.encode(file.read_text(errors="replace")) for file in files]
    assert fim.texts.word.any()  # the table is there: making it encodes a text too
    monkeypatch.setattr(type(fim.tokenizer), "encode_batch", counted)
    equal = []
    for number, ids in enumerate(documents):
        for key in range(4):
            near, whole = both(fim, ids, 10 * number + key)
            equal.append(near == whole)
    assert len(equal) > 100 and np.mean(equal) > 0.98
    assert sum(encoded[::2]) < sum(encoded[1::2]) / 5  # and that is what it saves


def test_cuts_at_every_place_of_a_document(fim: Fim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Including its ends, empty pieces, and pieces shorter than the margin."""
    text = (CODE + "aaaaaaaa   bbbb\n") * 2
    ids = fim.tokenizer.encode(text)
    assert len(ids) >= MIN_TOKENS
    decoded = fim.decode(ids)
    table, taken = fim.texts, 0
    if (table.characters[np.array(ids)] < 0).any():  # "naive" with two dots may be bytes
        text = text.replace("ï", "i")
        ids, decoded = fim.tokenizer.encode(text), text
    for low in [*range(0, 40), *range(40, len(decoded), 37), len(decoded)]:
        for high in {low, min(low + 1, len(decoded)), min(low + 90, len(decoded)), len(decoded)}:
            pieces = fim_near.near_pieces(
                table, fim.decode, np.array(ids), lambda _, cuts=(low, high): cuts
            )
            assert pieces is not None
            tokens = [
                [
                    token
                    for part in piece
                    for token in (fim.tokenizer.encode(part) if isinstance(part, str) else part)
                ]
                for piece in pieces
            ]
            expected = [decoded[:low], decoded[low:high], decoded[high:]]
            assert [fim.decode(piece) for piece in tokens] == [
                fim.decode(fim.tokenizer.encode(piece)) for piece in expected
            ]
            taken += 1
    assert taken > 100


def test_documents_with_parts_of_characters_take_the_long_way(fim: Fim) -> None:
    rare = fim.tokenizer.encode(CODE + "𝔘𐍈" + TEXT)
    assert (
        fim_near.near_pieces(fim.texts, fim.decode, np.array(rare), lambda size: (0, size)) is None
    )
    short = fim.tokenizer.encode("x = 1\n")
    assert (
        fim_near.near_pieces(fim.texts, fim.decode, np.array(short), lambda size: (0, size)) is None
    )
    near, whole = both(fim, rare, 3)
    assert near == whole
