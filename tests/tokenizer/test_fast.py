"""One law, for each family of tokenizers: the ids are the reference library's, for any text; no other tokenizer loads."""

from __future__ import annotations

import base64
import io
import itertools
import json
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from megacode.errors import UserError
from megacode.recipe import schema
from megacode.tokenizer import fast as fast_tokenizer
from megacode.tokenizer import fast_description
from megacode.tokenizer.fast import FastEncoder, check_sample, load_fast
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megacode.tokenizer.training import train_tokenizer
from tests.tokenizer.test_tokenizer import CORPUS, HOSTILE

gigatoken = pytest.importorskip("gigatoken")

FRAGMENTS = [
    *("<s>", "</s>", "<unk>", "<0x0A>", "<0x", "0A>", "<|endoftext|>", "<|fim_prefix|>", "<think>", "<think", "def", " x"),
    *("\u2581", "\u2581\u2581", "\0", "\r\n", "\n", "\t", " ", "  ", " " * 17, "\u200b", "\u200d", "\ufeff", "\ufffd", "\xa0"),
    *("e\u0301", "\u0323\u0301", "\u212b", "\u1100\u1161", "ſ", "'s", "'LL", "'ſ", "123", "٣", "½", "ª", "İ", "ß", "ǅ"),
    *("===", "----", "....", "aaaaaaa", "abab", "日本語", "\u3000", "\u2028", "\x85", "\x1c", "\u180e", "𝔘", "👨", "\u0378"),
    *("\u088f", "\U00010940", "\U000323b0", "\U0010ffff", "the ", "return", " unreachable", "self.", "x = 12\n", "()", "A", "Bc"),
]  # fmt: skip
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join),
    st.lists(
        st.one_of(
            st.sampled_from(FRAGMENTS),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
        )
    ).map("".join),
    st.text(st.sampled_from("ab= \n"), max_size=60),
    st.tuples(st.sampled_from(FRAGMENTS), st.integers(1, 300)).map(lambda pair: pair[0] * pair[1]),
)


def train_sentencepiece(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    settings_ = dict(
        model_type="bpe", vocab_size=420, byte_fallback=True, normalization_rule_name="identity"
    )
    settings_ |= dict(remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, **{**settings_, **options}
    )
    path.write_bytes(model.getvalue())
    return path


def byte_level_json(pattern: str | None, **changes: Any) -> dict[str, Any]:
    """A byte-level tokenizer.json trained on the corpus."""
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        made.pre_tokenizer = pre.Sequence(
            [pre.Split(tokenizers.Regex(pattern), "isolated"), made.pre_tokenizer]
        )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return {**json.loads(made.to_str()), **changes}


def with_added(contents: dict[str, Any], name: str, **flags: bool) -> dict[str, Any]:
    """The same with one more added token, found in text unless `special`."""
    last = max(
        [*contents["model"]["vocab"].values(), *(token["id"] for token in contents["added_tokens"])]
    )
    usual = dict(special=False, normalized=False, lstrip=False, rstrip=False, single_word=False)
    token = {"id": last + 1, "content": name, **usual, **flags}
    return {**contents, "added_tokens": [*contents["added_tokens"], token]}


def with_model(contents: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**contents, "model": {**contents["model"], **changes}}


def with_word(contents: dict[str, Any]) -> dict[str, Any]:
    """The same with a word that no merges lead to."""
    vocab = contents["model"]["vocab"]
    return with_model(contents, vocab={**vocab, "\u0120unreachable": max(vocab.values()) + 1})


def metaspace(scheme: str, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}


def byte_fallback_json(**changes: Any) -> dict[str, Any]:
    """BPE with byte fallback in a tokenizer.json, as SentencePiece models are converted."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, show_progress=False
    )
    made.train_from_iterator([text.replace(" ", "\u2581") for text in CORPUS], trainer)
    contents = json.loads(made.to_str())
    contents["added_tokens"] = contents["added_tokens"][:3]
    return {**contents, **changes}


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
LLAMA2 = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, REPLACE]}
NFC = {"type": "NFC"}


def write_json(path: Path, contents: dict[str, Any]) -> Path:
    path.write_text(json.dumps(contents))
    return path


def write_tiktoken(path: Path, pattern: str, reversed_bytes: bool = False) -> Path:
    pytest.importorskip("tiktoken")
    single = [bytes([i]) for i in range(256)]
    words = [
        *(
            b"he",
            b"el",
            b"ll",
            b"hell",
            b"hello",
            b" w",
            b"\n\n",
            b"<|",
            b"12",
            b"123",
            b"  ",
            b"    ",
        )
    ]
    words += [
        b"re",
        b"tu",
        b"retu",
        b"rn",
        b"return",
        b" unreachable",
        b"\xe6\x97",
        b"\xe6\x97\xa5",
        b"==",
        b"'s",
    ]
    ranks = [*(single[::-1] if reversed_bytes else single), *words]
    path.write_text(
        "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks))
    )
    described = {"pattern": pattern, "special_tokens": {"<|endoftext|>": len(ranks)}}
    path.with_name(path.name + ".json").write_text(json.dumps(described))
    return path


def load(path: Path) -> Tokenizer:
    return load_tokenizer(schema.TokenizerSection(path=str(path), added_tokens="crystal"))


def fast(path: Path) -> FastEncoder:
    encoder = load_fast(load(path))
    assert isinstance(encoder, FastEncoder), encoder
    return encoder


CL100K_BY_TIKTOKEN = fast_description._CL100K.removesuffix("+")
GPT2_BY_TIKTOKEN = next(iter(fast_description._WRITTEN))
TAKEN = {
    "ours": lambda path: train_tokenizer(CORPUS, path / "t.model", 420) or path / "t.model",
    "sentencepiece with a dummy prefix": lambda path: train_sentencepiece(path / "t.model", add_dummy_prefix=True),
    "sentencepiece across words": lambda path: train_sentencepiece(
        path / "t.model", split_by_whitespace=False, add_dummy_prefix=True, allow_whitespace_only_pieces=True
    ),
    "sentencepiece with symbols": lambda path: train_sentencepiece(
        path / "t.model", user_defined_symbols=["<think>", "é"], add_dummy_prefix=True
    ),
    "gpt2": lambda path: write_json(path / "t.json", byte_level_json(None)),
    "llama3": lambda path: write_json(path / "t.json", byte_level_json(fast_description._LLAMA3)),
    "qwen2": lambda path: write_json(
        path / "t.json", with_added(byte_level_json(fast_description._QWEN2, normalizer=NFC), "<think>", normalized=True)
    ),
    "qwen35": lambda path: write_json(path / "t.json", byte_level_json(fast_description._QWEN35)),
    "o200k": lambda path: write_json(path / "t.json", byte_level_json(fast_description._O200K)),
    "nemotron": lambda path: write_json(path / "t.json", byte_level_json(fast_description._NEMOTRON)),
    "ignored merges": lambda path: write_json(
        path / "t.json", with_model(with_word(byte_level_json(fast_description._LLAMA3)), ignore_merges=True)
    ),
    "added tokens in text": lambda path: write_json(
        path / "t.json",
        with_added(with_added(byte_level_json(None), "<think>", lstrip=True, rstrip=True), "def", single_word=True),
    ),
    "llama2": lambda path: write_json(path / "t.json", byte_fallback_json(normalizer=LLAMA2)),
    "gemma": lambda path: write_json(path / "t.json", byte_fallback_json(normalizer=REPLACE)),
    "metaspace first": lambda path: write_json(path / "t.json", byte_fallback_json(pre_tokenizer=metaspace("first", False))),
    "metaspace split": lambda path: write_json(path / "t.json", byte_fallback_json(pre_tokenizer=metaspace("always", True))),
    "tiktoken gpt2": lambda path: write_tiktoken(path / "t.tiktoken", GPT2_BY_TIKTOKEN),
    "tiktoken cl100k": lambda path: write_tiktoken(path / "t.tiktoken", CL100K_BY_TIKTOKEN, reversed_bytes=True),
    "tiktoken o200k": lambda path: write_tiktoken(path / "t.tiktoken", fast_description._O200K),
    "tiktoken qwen2": lambda path: write_tiktoken(path / "t.tiktoken", fast_description._QWEN2),
}  # fmt: skip


@pytest.fixture(scope="module", params=TAKEN)
def encoder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FastEncoder]:
    yield fast(TAKEN[request.param](tmp_path_factory.mktemp("fast")))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> FastEncoder:
    return fast(TAKEN["ours"](tmp_path_factory.mktemp("ours")))


def ids_of(encoder: FastEncoder, texts: Sequence[str]) -> list[list[int]]:
    ids, offsets = encoder.encode_documents([text.encode() for text in texts])
    assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
    assert len(offsets) == len(texts) + 1
    assert offsets[0] == 0
    assert offsets[-1] == len(ids)
    return [ids[begin:end].tolist() for begin, end in itertools.pairwise(offsets)]


# ------------------------------------------------------------------------------------------------------------- the law


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(TEXTS, max_size=8))
def test_ids_are_the_reference_librarys_for_any_text(
    encoder: FastEncoder, texts: list[str]
) -> None:
    assert ids_of(encoder, texts) == encoder.tokenizer.encode_batch(texts)


def test_ids_are_the_reference_librarys_for_hostile_texts(encoder: FastEncoder) -> None:
    texts = [*HOSTILE, *CORPUS, *FRAGMENTS, *(f"x{a} {b}y" for a in FRAGMENTS for b in FRAGMENTS)]
    ids = ids_of(encoder, texts)
    assert ids == encoder.tokenizer.encode_batch(texts)
    assert not set(encoder.tokenizer.control_tokens.values()) & {i for row in ids for i in row}


@pytest.mark.parametrize(
    "text", ["a" * 2**20, " " * 2**17, "=" * 2**17, "日本語" * 50000, "ab\n" * 2**17], ids=len
)
def test_ids_are_the_reference_librarys_for_long_lines(ours: FastEncoder, text: str) -> None:
    assert ids_of(ours, [text, "x", text]) == ours.tokenizer.encode_batch([text, "x", text])


def test_a_character_of_every_kind(encoder: FastEncoder) -> None:
    """Every character of plane 0, and every 61st of the others, in places where its class matters."""
    characters = [
        chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and (c < 0x10000 or c % 61 == 0)
    ]
    if not encoder.classes:
        characters = characters[:: len(characters) // 2000]
    # Settled ones are for gigatoken; the others are the reference's anyway. Long texts are faster than many.
    settled = [c for c in characters if not encoder.is_exact(c.encode())]
    texts = [
        "".join(f"a{c}b 1{c} {c}.{c}'{c}A{c}\n{c}\n" for c in settled[i : i + 40])
        for i in range(0, len(settled), 40)
    ]
    texts = [text for text in texts if not encoder.is_exact(text.encode())]
    assert len(texts) > 20
    assert ids_of(encoder, texts) == encoder.tokenizer.encode_batch(texts)


def test_no_documents(encoder: FastEncoder) -> None:
    assert ids_of(encoder, []) == []
    assert ids_of(encoder, ["", ""]) == [[], []]


def test_a_renewed_backend_goes_on(ours: FastEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_tokenizer, "_RENEW_BYTES", 10)
    before = ours.backend.tokenizer
    assert ids_of(ours, CORPUS) == ids_of(ours, CORPUS) == ours.tokenizer.encode_batch(CORPUS)
    assert ours.backend.tokenizer is not before


# --------------------------------------------------------------------------------- why some documents are kept from it


def test_gigatokens_own_reading_of_a_model_finds_control_tokens(
    tmp_path: Path, ours: FastEncoder
) -> None:
    """Why it is given a description of ours: with its own, text becomes a control token."""
    own = gigatoken.Tokenizer(str(TAKEN["ours"](tmp_path)))
    control = set(ours.tokenizer.base.control.values())
    assert control & set(own.encode("a <s> b").tolist())
    assert not control & set(ids_of(ours, ["a <s> b"])[0])
    assert not ours.is_exact(b"a <s> b")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("sentencepiece with symbols", "a <think> b"),
        ("sentencepiece with symbols", "naïve café"),
        ("added tokens in text", "a <think> b"),
        ("qwen2", "a <think> b"),
    ],
)
def test_documents_with_symbols_must_take_the_exact_path(
    tmp_path: Path, kind: str, text: str
) -> None:
    encoder = fast(TAKEN[kind](tmp_path))
    others = ["return", "", "the fox"]
    assert encoder.is_exact(text.encode())
    for texts in ([text], [text, *others], [*others, text], [text, text, *others, text]):
        assert ids_of(encoder, texts) == encoder.tokenizer.encode_batch(texts)
        assert ids_of(replace(encoder, literals=None), texts) != encoder.tokenizer.encode_batch(
            texts
        )


def test_young_letters_must_take_the_exact_path(tmp_path: Path) -> None:
    encoder = fast(TAKEN["llama3"](tmp_path))
    young = [f"12{chr(c)}3 4" for c in (0x088F, 0x0C5C, 0xA7CE, 0x10940, 0x16EA0, 0x323B0)]
    assert all(encoder.is_exact(text.encode()) for text in young)
    for text in ("naïve café", "日本語", "👨\u200d👩\u200d👧 𝔘", "½ ٣ हिन्दी ไทย", "\u0301"):
        assert not encoder.is_exact(text.encode())


def test_what_is_not_nfc_must_take_the_exact_path(tmp_path: Path) -> None:
    encoder = fast(TAKEN["qwen2"](tmp_path))
    texts = [
        "cafe\u0301 \u212b",
        "\u1100\u1161\u11a8 a\u0323\u0301",
        "a\u0301\u0323\u0345\u0301",
        "a\u1df6\u0323",
    ]
    assert all(encoder.is_exact(text.encode()) for text in texts)
    assert not any(encoder.is_exact(text.encode()) for text in ("naïve", "हिन्दी", "\u1ea1\u0315"))
    assert ids_of(encoder, texts) == encoder.tokenizer.encode_batch(texts)
    assert ids_of(replace(encoder, nfc=False), texts) != encoder.tokenizer.encode_batch(texts)
    marks = [chr(c) for c in range(0x300, 0x3100) if unicodedata.combining(chr(c))]
    texts = [f"{a}{mark}\u0323 {a}\u0301{mark}" for mark in marks for a in "aé"]
    assert ids_of(encoder, texts) == encoder.tokenizer.encode_batch(texts)


# ------------------------------------------------------------------------------------------------- what it does not take


def changed_model(path: Path, change: Any) -> Path:
    """Our model with its description changed by `change(model)`."""
    train_tokenizer(CORPUS, path, 420)
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def equal_scores(model: Any) -> None:
    for piece in model.pieces[300:310]:
        piece.score = -5.0


def like_a_byte(model: Any) -> None:
    model.pieces[-1].piece = "<0x0a>"


SPLIT = {
    "type": "Split",
    "pattern": {"Regex": fast_description._LLAMA3},
    "behavior": "Isolated",
    "invert": False,
}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
REFUSED = {
    "is not BPE": lambda path: train_sentencepiece(path / "t.model", model_type="unigram", vocab_size=330),
    "without byte fallback": lambda path: train_sentencepiece(path / "t.model", byte_fallback=False, vocab_size=120),
    "normalizer nmt_nfkc": lambda path: train_sentencepiece(path / "t.model", normalization_rule_name="nmt_nfkc"),
    "remove_extra_whitespaces": lambda path: train_sentencepiece(path / "t.model", remove_extra_whitespaces=True),
    "whitespace_as_suffix": lambda path: train_sentencepiece(path / "t.model", treat_whitespace_as_suffix=True),
    "equal score": lambda path: changed_model(path / "t.model", equal_scores),
    "spelt like a byte": lambda path: changed_model(path / "t.model", like_a_byte),
    "symbol with a blank": lambda path: train_sentencepiece(path / "t.model", user_defined_symbols=["\u2581\u2581"]),
    "is not on the list: none": lambda path: write_json(path / "t.json", byte_level_json(None, pre_tokenizer=None)),
    "is not on the list: ByteLevel": lambda path: write_json(path / "t.json", byte_level_json(None, pre_tokenizer=LEVEL)),
    "Digits, Split, ByteLevel": lambda path: write_json(path / "t.json", byte_level_json(None, pre_tokenizer={
        "type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, SPLIT, LEVEL]})),
    "does not isolate": lambda path: write_json(path / "t.json", byte_level_json(None, pre_tokenizer={
        "type": "Sequence", "pretokenizers": [{**SPLIT, "behavior": "MergedWithPrevious"}, LEVEL]})),
    "pattern that is not on the list": lambda path: write_json(
        path / "t.json", byte_level_json(fast_description._CL100K)),
    "normalizer that is not NFC": lambda path: write_json(path / "t.json", byte_level_json(None, normalizer={
        "type": "NFKC"})),
    "found in normalized text": lambda path: write_json(path / "t.json", with_added(
        byte_level_json(None, normalizer=NFC), "é", normalized=True)),
    "BPE dropout": lambda path: write_json(path / "t.json", with_model(byte_level_json(None), dropout=0.1)),
    "a normalizer that is not SentencePiece": lambda path: write_json(path / "t.json", byte_fallback_json(normalizer={
        "type": "Strip", "strip_left": True, "strip_right": True})),
    "the pre-tokenizer Whitespace": lambda path: write_json(path / "t.json", byte_fallback_json(pre_tokenizer={
        "type": "Whitespace"})),
    "splitting pattern": lambda path: write_tiktoken(path / "t.tiktoken", r"\p{L}+|\s+|[^\s\p{L}]+"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_was_not_compared_does_not_load(tmp_path: Path, reason: str) -> None:
    answer = load_fast(load(REFUSED[reason](tmp_path)))
    assert isinstance(answer, str)
    assert reason in answer


def test_the_self_check_refuses_other_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a pattern on the list were split otherwise by gigatoken."""
    path = write_json(tmp_path / "t.json", byte_level_json(fast_description._CL100K))
    monkeypatch.setattr(fast_description, "_PATTERNS", (fast_description._CL100K,))
    answer = load_fast(load(path))
    assert isinstance(answer, str)
    assert "other ids than the reference library for" in answer


@pytest.mark.parametrize("missing", ["gigatoken", "awkward"])
def test_a_missing_library_is_a_reason(
    ours: FastEncoder, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    answer = load_fast(ours.tokenizer)
    assert isinstance(answer, str)
    assert missing in answer


# ---------------------------------------------------------------------------------------------------------- check_sample


def test_a_sample_with_other_ids_fails_loudly(ours: FastEncoder) -> None:
    text = CORPUS[0].encode()
    ids, _ = ours.encode_documents([text])
    check_sample(ours.tokenizer, "a.jsonl:7", text, ids)
    check_sample(ours.tokenizer, "a.jsonl:8", b"", ids[:0])
    wrong = ids.copy()
    wrong[5] = 1
    with pytest.raises(UserError, match=rf"a\.jsonl:7: .* at position 5 \(1 instead of {ids[5]}\)"):
        check_sample(ours.tokenizer, "a.jsonl:7", text, wrong)
    with pytest.raises(
        UserError, match=rf"at position {len(ids) - 1} \(nothing instead of {ids[-1]}\)"
    ):
        check_sample(ours.tokenizer, "a.jsonl:7", text, ids[:-1])
    with pytest.raises(UserError, match=rf"at position {len(ids)} \(3 instead of nothing\)"):
        check_sample(ours.tokenizer, "a.jsonl:7", text, np.append(ids, np.uint32(3)))
