"""Laws of fill-in-the-middle: nothing is lost, draws replay, edges and control tokens survive."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.data.fim import Fim, make_fim, rearrange
from megacode.data.loader import StepReader
from megacode.data.mixture import OpenMixture
from megacode.data.permute import uniform_bits
from megacode.errors import UserError
from megacode.recipe import schema
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megacode.tokenizer.training import train_tokenizer
from tests.data.conftest import mixture_of, recipe_of, write_shard

CODE = (
    "def add(left, right):\n    return left + right  # naïve, 12 + 34\n\n\nclass Point:\n\tx = 1\n"
    * 4
)
TEXT = "It was the best of times, it was the worst of times. Grüße aus Köln, 你好 and 🎉!\n" * 4
FILENAME = "<filename>"


def trained(path: Path, kind: str) -> Tokenizer:
    """`ours`: as megacode trains them. `llama`: a space before every text. `bytes`: byte-level BPE."""
    if kind == "ours":
        train_tokenizer([CODE, TEXT], path / "t.model", vocab_size=400, character_coverage=0.98)
    elif kind == "llama":
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter((CODE + TEXT).splitlines()), model_writer=model, model_type="bpe", vocab_size=400,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            hard_vocab_limit=False, minloglevel=2, num_threads=1, character_coverage=0.98,
        )  # fmt: skip
        (path / "t.model").write_bytes(model.getvalue())
    else:
        tokenizers = pytest.importorskip("tokenizers")
        tokenizer = tokenizers.ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(
            [CODE, TEXT], 330, special_tokens=["<s>", "</s>"], show_progress=False
        )
        tokenizer.save(str(path / "tokenizer.json"))
        return load_tokenizer(
            schema.TokenizerSection(path=str(path / "tokenizer.json"), added_tokens="crystal")
        )
    return load_tokenizer(
        schema.TokenizerSection(path=str(path / "t.model"), added_tokens="crystal")
    )


@pytest.fixture(scope="module", params=["ours", "llama", "bytes"])
def fim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fim:
    return make_fim(schema.FimSection(), trained(tmp_path_factory.mktemp("t"), request.param))


def rearranged(fim: Fim, windows: Any, keys: Any, rates: Any) -> tuple[np.ndarray, np.ndarray]:
    """`rearrange` of whole windows."""
    lengths = np.full(len(windows), len(windows[0]))
    return rearrange(fim, windows, keys, rates, lengths, np.zeros(len(windows), dtype=bool))


def apply(fim: Fim, ids: list[int], key: int = 1, rate: float = 1.0, room: int = 400) -> list[int]:
    """One window of `ids` and `room` end-of-document tokens, so that nothing need be cut; the real tokens come back."""
    window = [*ids, *[fim.eod] * room]
    out, lengths = rearranged(
        fim, np.array([window]), np.array([key], dtype=np.uint64), np.array([rate])
    )
    assert out.shape == (1, len(window)) and (out[0, lengths[0] :] == fim.pad).all()
    tokens = out[0, : lengths[0]].tolist()
    while room and tokens and tokens[-1] == fim.eod:
        tokens.pop()
    return tokens


def undo(fim: Fim, ids: list[int]) -> list[list[int]] | None:
    """[prefix, middle, suffix] of a document written as PSM; None for one that was left alone."""
    if fim.prefix not in ids:
        return None
    assert [sum(i == token for i in ids) for token in (fim.prefix, fim.middle, fim.suffix)] == [
        1,
        1,
        1,
    ]
    start, middle, suffix = ids.index(fim.prefix), ids.index(fim.middle), ids.index(fim.suffix)
    assert start < suffix < middle
    return [ids[start + 1 : suffix], ids[middle + 1 :], ids[suffix + 1 : middle]]


def form(fim: Fim, form: str) -> Fim:
    """The same, always in one form."""
    return replace(fim, spm_rate={"psm": 0.0, "spm": 1.0}[form])


def text_of(fim: Fim, pieces: list[list[int]]) -> str:
    return "".join(fim.tokenizer.decode(piece) for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=60), key=st.integers(0, 2**64 - 1))
def test_unpermuting_psm_gives_the_text_back(fim: Fim, text: str, key: int) -> None:
    ids = fim.tokenizer.encode_batch([text])[0]
    original = fim.tokenizer.decode(ids)  # SentencePiece takes U+2581 for a space
    psm = form(fim, "psm")
    found = undo(psm, apply(psm, ids, key))
    if found is None:
        assert original == "" or "\ufffd" in original
        return
    assert text_of(fim, found) == original


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=60),
    key=st.integers(0),
)
def test_spm_holds_suffix_then_prefix_and_middle(fim: Fim, text: str, key: int) -> None:
    spm = form(fim, "spm")
    psm = form(fim, "psm")
    ids = fim.tokenizer.encode_batch([text])[0]
    prefix, middle, suffix = undo(psm, apply(psm, ids, key % 2**64)) or [[], [], []]
    if [*prefix, *middle, *suffix]:
        expected = [fim.prefix, fim.suffix, *suffix, fim.middle, *prefix, *middle]
        assert apply(spm, ids, key % 2**64) == expected


def test_draws_replay_and_differ_by_key(fim: Fim) -> None:
    ids = fim.tokenizer.encode_batch([CODE])[0]
    assert apply(fim, ids, 5) == apply(fim, ids, 5)
    assert len({tuple(apply(fim, ids, key)) for key in range(20)}) == 20


def test_rates_and_cuts_are_as_asked(fim: Fim) -> None:
    """Over 400 documents: rate 0.3, half of them SPM, and cuts uniform over the characters."""
    ids = fim.tokenizer.encode_batch(["abcdefghij"])[0]
    keys = uniform_bits(3, np.arange(400))
    found = [apply(fim, ids, int(key), rate=0.3, room=12) for key in keys]
    changed = [out for out in found if out != ids]
    assert all(out[0] == fim.prefix for out in changed) and abs(len(changed) - 120) < 40
    suffix_first = sum(
        out[1] == fim.suffix for out in changed
    )  # or PSM with an empty prefix: 1 in 6
    assert abs(suffix_first / len(changed) - (0.5 + 0.5 * 21 / 121)) < 0.15
    psm = form(fim, "psm")
    cuts: Counter[tuple[int, int]] = Counter()
    for key in keys:
        pieces = undo(psm, apply(psm, ids, int(key), room=12)) or []
        lengths = [len(fim.tokenizer.decode(piece)) for piece in pieces]
        assert sum(lengths) == 10
        cuts[lengths[0], lengths[1]] += 1
    low = np.mean([first for (first, _), n in cuts.items() for _ in range(n)])
    middle = np.mean([size for (_, size), n in cuts.items() for _ in range(n)])
    assert abs(low - 3.18) < 0.6 and abs(middle - 3.64) < 0.7  # of two uniform draws from 0 ... 10
    assert {(0, 10), (0, 0), (10, 0)} & set(cuts)


def test_each_document_is_rearranged_by_itself_between_bos_and_eod(fim: Fim) -> None:
    texts = [CODE[:80], "x = 1", TEXT[:50]]
    documents = [fim.tokenizer.encode_batch([text])[0] for text in texts]
    bos, fim = fim.bos, form(fim, "psm")
    assert bos is not None
    out = apply(fim, list(itertools.chain(*([bos, *ids, fim.eod] for ids in documents))))
    parts = [
        list(part)
        for is_end, part in itertools.groupby([*out, fim.eod], lambda i: i == fim.eod)
        if not is_end
    ]
    assert len(parts) == 3
    for part, text in zip(parts, texts, strict=True):
        assert part[:2] == [bos, fim.prefix]
        assert text_of(fim, undo(fim, part) or []) == text


def test_control_tokens_move_with_the_text_and_text_never_becomes_one(fim: Fim) -> None:
    name = fim.tokenizer.token_id(FILENAME)
    psm = form(fim, "psm")
    before, after = (
        fim.tokenizer.encode_batch([text])[0] for text in ("src/<filename>.py\n", "x = '</s><s>'")
    )
    ids = [name, *before, name, *after, name]
    for key in range(60):
        pieces = undo(psm, apply(psm, ids, key)) or []
        order = [i for piece in pieces for i in piece]
        assert [i == name for i in order].count(True) == 3
        runs = [
            list(run)
            for is_name, run in itertools.groupby(order, lambda i: i == name)
            if not is_name
        ]
        assert order[0] == order[-1] == name and len(runs) == 2
        assert fim.eod not in order and fim.bos not in order
    # Documents of control tokens only, and of nothing, are no trouble.
    assert sorted(apply(psm, [name, name])) == sorted(
        [name, name, fim.prefix, fim.middle, fim.suffix]
    )
    assert apply(psm, [fim.eod, fim.eod, name])[:2] == [fim.eod, fim.eod]


def test_a_window_may_start_and_end_inside_a_character(fim: Fim) -> None:
    """Every cut of a text of rare characters: the tokens of a broken character stay at the edge, nothing is lost."""
    fim, broken = form(fim, "psm"), 0
    ids = fim.tokenizer.encode_batch(["ab 𝔘𝔫𝔦 ☃ é cd 𐍈𐍈"])[0]
    # Characters one by one: encoding again takes fewer tokens, which leaves room for the document after it.
    first = [
        *(ids[-1] for ids in fim.tokenizer.encode_batch(["~" + c for c in CODE[:40]])),
        fim.eod,
    ]

    def check(part: list[int], document: list[int], left: int, right: int) -> None:
        start = document.index(fim.prefix)
        assert (
            document[:start] == part[:left]
            and document[len(document) - right :] == part[len(part) - right :]
        )
        pieces = undo(fim, document[start : len(document) - right]) or []
        # Without spaces: some tokenizers drop one at the beginning of what they decode.
        whole = fim.tokenizer.decode(part[left : len(part) - right]).replace(" ", "")
        assert text_of(fim, pieces).replace(" ", "") == whole

    for start, end in itertools.combinations(range(len(ids) + 1), 2):
        part = ids[start:end]
        key = start * 100 + end
        begins, ends = (
            fim.tokenizer.decode(part).startswith("\ufffd"),
            fim.tokenizer.decode(part).endswith("\ufffd"),
        )
        left, right = (
            next((k for k in range(4) if not edge(fim.tokenizer.decode(cut(part, k)))), 0)
            for edge, cut in (
                (lambda text: text.startswith("\ufffd"), lambda ids, k: ids[k:]),
                (lambda text: text.endswith("\ufffd"), lambda ids, k: ids[: len(ids) - k]),
            )
        )
        broken += begins + ends
        if not ends and fim.tokenizer.decode(part[left:]):
            check(part, apply(fim, part, key, room=12), left, 0)
        if not begins and fim.tokenizer.decode(part[: len(part) - right]):
            out = apply(fim, [*first, *part], key, room=0)
            check(part, out[out.index(fim.eod) + 1 :], 0, right)
    assert broken > 10


def test_bytes_that_are_no_text_are_left_alone(fim: Fim) -> None:
    """Half a character in the middle of a document cannot be decoded and encoded again."""
    ids = fim.tokenizer.encode_batch(["ab 𐍈𐍈 cd"])[0]
    start = next(i for i in range(len(ids)) if "\ufffd" in fim.tokenizer.decode(ids[:i]))
    damaged = [*ids[:start], *fim.tokenizer.encode_batch([" cd"])[0]]
    assert apply(fim, [fim.eod, *damaged, fim.eod])[1:] == damaged


def test_a_real_replacement_character_is_text(fim: Fim) -> None:
    psm = form(fim, "psm")
    ids = fim.tokenizer.encode_batch(["a \ufffd b"])[0]
    found = [undo(psm, apply(psm, ids, key)) for key in range(5)]
    assert all(pieces is not None and text_of(fim, pieces) == "a \ufffd b" for pieces in found)


def test_windows_keep_their_length(fim: Fim) -> None:
    """Three more tokens are cut off at the end; fewer tokens are padded, and have no loss (see the loader)."""
    ids = fim.tokenizer.encode_batch([CODE + TEXT])[0][:90]
    keys, rates = uniform_bits(1, np.arange(50)), np.full(50, 1.0)
    out, lengths = rearranged(fim, np.tile(ids, (50, 1)), keys, rates)
    assert out.shape == (50, 90) and (lengths <= 90).all() and (lengths == 90).sum() > 25
    for row, length in zip(out, lengths, strict=True):
        assert (row[length:] == fim.pad).all() and fim.pad not in row[:length]


def test_a_batch_gives_what_each_window_gives_alone(fim: Fim) -> None:
    ids = fim.tokenizer.encode_batch([CODE + TEXT])[0]
    windows = np.array([ids[i : i + 64] for i in range(0, 60, 6)])
    keys = uniform_bits(9, np.arange(10))
    rates = np.linspace(0, 1, 10)
    together, lengths = rearranged(fim, windows, keys, rates)
    for row in range(10):
        one = slice(row, row + 1)
        alone, length = rearranged(fim, windows[one], keys[one], rates[one])
        assert np.array_equal(alone[0], together[row]) and length[0] == lengths[row]
    assert np.array_equal(together[0], windows[0])


def test_a_tokenizer_without_the_tokens_is_one_sentence(tmp_path: Path) -> None:
    train_tokenizer([CODE, TEXT], tmp_path / "t.model", vocab_size=400)
    tokenizer = load_tokenizer(schema.TokenizerSection(path=str(tmp_path / "t.model")))
    with pytest.raises(UserError, match=r"data\.fim\.prefix: .*no control token <\|fim_prefix\|>"):
        make_fim(schema.FimSection(), tokenizer)


# ------------------------------------------------------------------------------------------------------- in a mixture


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("t"), "ours")


@pytest.fixture(scope="module")
def mixture(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> OpenMixture:
    folder = tmp_path_factory.mktemp("corpus")
    # Characters one by one are more tokens than the tokenizer would make: encoding again leaves room to pad.
    ids = [
        [tokenizer.bos_id, *itertools.chain(*tokenizer.encode_batch(list(CODE))), tokenizer.eod_id]
    ]
    ids += [
        [tokenizer.bos_id, *tokenizer.encode_batch([text])[0], tokenizer.eod_id]
        for text in (CODE, TEXT)
    ]
    write_shard(folder / "code", ids * 4, tokenizer.vocab_size)
    sources: dict[str, Any] = {name: {"path": str(folder / "code")} for name in ("code", "text")}
    mixed = {"sources": {"code": {"weight": 1, "fim_rate": 0.9}, "text": 1}}
    phase = {"steps": 12, "sequence_length": 64, "mixture": mixed}
    return mixture_of(
        recipe_of(sources, [phase, {**phase, "mixture": {"sources": {"code": 1}}, "fim_rate": 0.5}])
    )


def test_fim_replays_in_any_layout_and_from_any_step(
    mixture: OpenMixture, tokenizer: Tokenizer
) -> None:
    straight = [StepReader(mixture, tokenizer=tokenizer).read(step) for step in range(24)]
    for world, size in ((1, 8), (2, 2), (4, 1)):
        ranks = [
            StepReader(mixture, rank=rank, world=world, micro_batch_size=size, tokenizer=tokenizer)
            for rank in range(world)
        ]
        for step in (17, 3):
            assert sum(rank.read(step).digest for rank in ranks) % 2**64 == straight[step].digest
    assert len({batch.digest for batch in straight}) == 24


def test_epochs_draw_afresh_and_rates_go_by_stream(
    mixture: OpenMixture, tokenizer: Tokenizer
) -> None:
    reader = StepReader(mixture, tokenizer=tokenizer)
    prefix = tokenizer.token_id("<|fim_prefix|>")
    seen: dict[tuple[int, int], set[bytes]] = {}
    for step in range(24):
        batch = reader.read(step)
        for index, part in enumerate(batch.micro_batches):
            stream, start = int(batch.samples.stream[index]), int(batch.samples.start[index])
            seen.setdefault((stream, start), set()).add(part.tokens.tobytes())
            if batch.samples.phase.streams[stream].source == "text":
                assert prefix not in part.tokens
    assert any(len(forms) > 2 for (stream, _), forms in seen.items() if stream == 0)
    assert all(len(forms) == 1 for (stream, _), forms in seen.items() if stream == 1)


def test_padding_has_no_loss(mixture: OpenMixture, tokenizer: Tokenizer) -> None:
    reader, pad, padded = (
        StepReader(mixture, tokenizer=tokenizer),
        tokenizer.token_id("<|fim_pad|>"),
        0,
    )
    for step in range(24):
        for part in reader.read(step).micro_batches:
            assert np.array_equal(part.labels == pad, part.loss_mask == 0)
            padded += int((part.labels == pad).sum())
    assert padded > 0
