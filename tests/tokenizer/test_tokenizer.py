"""Laws: text never becomes a control token; ids are the library's own; what was encoded comes back."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.cli.main import main
from megacode.errors import UserError
from megacode.recipe import schema
from megacode.tokenizer.tokenizer import CRYSTAL_TOKENS, Tokenizer, load_tokenizer, well_formed
from megacode.tokenizer.training import sample, train_tokenizer, write_byte_tokenizer

CORPUS = [
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n\tx = 12\n\ty = 345\n" * 3,
    "The quick brown fox jumps over the lazy dog. It was the best of times, it was the worst of times.\n"
    * 3,
    "for i in range(100):\r\n    print(i, 'naïve café', \"übung\")\n" * 3,
    "<s>literal</s> <|fim_prefix|> <filename> in the corpus itself\n" * 3,
]
HOSTILE = [
    "",
    " ",
    "  leading and trailing  \n\n",
    "\t\ttabs\tand\x0bvertical\x0c",
    "\r\nCRLF\r\n\rCR\n",
    "a\0b\0",
    "<s></s><unk><pad><0x0A><|fim_prefix|>x<|fim_suffix|><|endoftext|><filename>",
    "<s" + ">",
    "zero\u200bwidth\u200d\u200cjoiners\ufeff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff \U000e0001 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "".join(
        chr(plane << 16 | 0x1234)
        for plane in range(17)
        if not 0xD800 <= (plane << 16 | 0x1234) < 0xE000
    ),
    "e\u0301 \u1100\u1161 ﬁ Å \u212b \u2028\u2029\u0085",
    "1234567890 ٣٤ Ⅷ ½",
    "x" * 5000 + "\n" + " " * 3000,
    "\ufffd\ufffe\uffff",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer(CORPUS, path, vocab_size=420)
    return path


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(schema.TokenizerSection(path=str(model), added_tokens="crystal"))


def control_ids(tokenizer: Tokenizer) -> set[int]:
    return set(tokenizer.control_tokens.values())


# ------------------------------------------------------------------------------------------------------- sentencepiece


@pytest.mark.parametrize("text", HOSTILE)
def test_ids_are_sentencepieces(tokenizer: Tokenizer, model: Path, text: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert tokenizer.encode(text) == reference.encode(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_round_trip_is_exact(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_round_trip_is_exact_for_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not control_ids(tokenizer) & set(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_pieces_of_a_text_decode_to_the_text(tokenizer: Tokenizer, left: str, right: str) -> None:
    """What fill-in-the-middle leans on: no blank appears where a piece begins."""
    left, right = (well_formed(part).replace("\u2581", "") for part in (left, right))
    assert tokenizer.decode(tokenizer.encode(left) + tokenizer.encode(right)) == left + right


def test_sentencepieces_space_mark_comes_back_as_a_space(tokenizer: Tokenizer) -> None:
    """The one exception, as documented."""
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    text = json.loads(r'"a\ud800b\udc00\ud83d"')
    assert tokenizer.decode(tokenizer.encode(text)) == "a\ufffdb\ufffd\ufffd"
    assert well_formed("\ud83d\ude00") == "\U0001f600"


def test_crystals_tokens_follow_the_vocabulary(tokenizer: Tokenizer) -> None:
    base = 420
    assert len(CRYSTAL_TOKENS) == 32
    assert [tokenizer.token_id(name) for name in CRYSTAL_TOKENS] == list(range(base, base + 32))
    assert tokenizer.vocab_size == base + 32
    assert (tokenizer.token_id("<|fim_pad|>"), tokenizer.token_id("<reponame>")) == (
        base + 3,
        base + 17,
    )
    assert (tokenizer.bos_id, tokenizer.eod_id, tokenizer.pad_id) == (1, 2, None)


@pytest.mark.parametrize("name", [*CRYSTAL_TOKENS, "<s>", "</s>", "<unk>"])
def test_a_control_tokens_spelling_is_text(tokenizer: Tokenizer, name: str) -> None:
    for text in (name, f"x{name}y", f" {name}\n", name * 3):
        ids = tokenizer.encode(text)
        assert not control_ids(tokenizer) & set(ids)
        assert tokenizer.decode(ids) == text


def test_decode_leaves_control_tokens_out_or_names_them(tokenizer: Tokenizer) -> None:
    ids = [
        1,
        *tokenizer.encode("hi"),
        tokenizer.token_id("<|fim_middle|>"),
        *tokenizer.encode("é"),
        2,
        10**6,
    ]
    assert tokenizer.decode(ids) == "hié\ufffd"
    assert tokenizer.decode(ids, control=True) == "<s>hi<|fim_middle|>é</s>\ufffd"
    assert tokenizer.decode([]) == ""


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(HOSTILE) == [tokenizer.encode(text) for text in HOSTILE]


def test_a_fingerprint_tells_added_tokens_apart(model: Path) -> None:
    prints = {
        load_tokenizer(schema.TokenizerSection(path=str(model), added_tokens=added)).fingerprint()
        for added in ("none", "crystal", ["<a>"], ["<b>"])
    }
    assert len(prints) == 4


def test_digits_stand_alone_and_every_byte_has_a_piece(model: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [reference.id_to_piece(i) for i in range(reference.get_piece_size())]
    assert not [p for p in pieces if sum(c.isdigit() for c in p) > 1 and not p.startswith("<0x")]
    assert {f"<0x{i:02X}>" for i in range(256)} <= set(pieces)


def test_training_twice_gives_the_same_file(model: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(CORPUS), tmp_path / "again.model", vocab_size=420)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_training_survives_hostile_documents(tmp_path: Path) -> None:
    train_tokenizer(
        [*CORPUS, *HOSTILE, "a\ud800b", "\u2581\u2585\0"], tmp_path / "t.model", vocab_size=500
    )
    loaded = load_tokenizer(schema.TokenizerSection(path=str(tmp_path / "t.model")))
    assert all(loaded.decode(loaded.encode(text)) == text for text in HOSTILE)


def test_too_many_pieces_for_the_text_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot train a tokenizer of 50000 pieces.*fewer"):
        train_tokenizer(CORPUS, tmp_path / "t.model", vocab_size=50000)
    with pytest.raises(UserError, match="cannot train"):
        train_tokenizer([], tmp_path / "t.model", vocab_size=500)
    assert not list(tmp_path.iterdir())


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_a_token_of_the_byte_tokenizer_is_a_byte(byte_tokenizer: Tokenizer, text: str) -> None:
    ids = byte_tokenizer.encode(text)
    assert len(ids) == len(text.encode()) and byte_tokenizer.decode(ids) == text
    assert byte_tokenizer.vocab_size == 257 and byte_tokenizer.eod_id not in ids


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bytes") / "bytes.json"
    write_byte_tokenizer(path)
    return load_tokenizer(schema.TokenizerSection(path=str(path), eod=True))


def test_a_sample_does_not_depend_on_order() -> None:
    texts = [f"document {i}" for i in range(1000)]
    chosen = set(sample(texts, 0.3))
    assert chosen == set(sample(reversed(texts), 0.3))
    assert 240 < len(chosen) < 360
    assert set(sample(texts, 0.1)) < chosen


# -------------------------------------------------------------------------------------------------------- hugging face


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(
        [tokenizers.AddedToken("<|fim_prefix|>", special=False)]
    )  # as Qwen's file has it
    made.add_tokens([tokenizers.AddedToken("<think>", special=False)])
    made.enable_truncation(8)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    made.save(str(path))
    (path.parent / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": "<s>", "eos_token": {"content": "<|endoftext|>"}, "pad_token": None}
        )
    )
    return path


@pytest.mark.parametrize("text", HOSTILE)
def test_huggingface_text_stays_text(huggingface: Path, text: str) -> None:
    import tokenizers

    loaded = load_tokenizer(schema.TokenizerSection(path=str(huggingface), added_tokens="crystal"))
    ids = loaded.encode(text)
    assert not control_ids(loaded) & set(ids)
    assert loaded.decode(ids) == text
    reference = tokenizers.Tokenizer.from_file(str(huggingface))
    reference.no_truncation()
    reference.encode_special_tokens = True
    if "<|fim_prefix|>" not in text:
        assert ids == reference.encode(text, add_special_tokens=False).ids


def test_huggingface_keeps_ids_that_are_there(huggingface: Path) -> None:
    contents = json.loads(huggingface.read_text())
    there = {token["content"]: token["id"] for token in contents["added_tokens"]}
    loaded = load_tokenizer(
        schema.TokenizerSection(path=str(huggingface.parent), added_tokens="crystal")
    )
    assert loaded.kind == "huggingface"
    assert loaded.token_id("<|fim_prefix|>") == there["<|fim_prefix|>"]
    assert loaded.token_id("<|fim_middle|>") == max(there.values()) + 1
    assert (loaded.bos_id, loaded.eod_id, loaded.pad_id) == (
        there["<s>"],
        there["<|endoftext|>"],
        None,
    )
    with pytest.raises(UserError, match="<think> is an ordinary piece"):
        loaded.token_id("<think>")


def test_a_list_can_make_a_piece_of_the_file_a_control_token(huggingface: Path) -> None:
    loaded = load_tokenizer(
        schema.TokenizerSection(path=str(huggingface), added_tokens=["<think>"])
    )
    assert loaded.token_id("<think>") not in loaded.encode("a <think> b")


# ------------------------------------------------------------------------------------------------------------ tiktoken


@pytest.fixture
def tiktoken_file(tmp_path: Path) -> Path:
    pytest.importorskip("tiktoken")
    ranks = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b" w", b"\n\n", b"<|"]
    path = tmp_path / "tiny.tiktoken"
    path.write_text(
        "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks))
    )
    return path


def give_pattern(path: Path, **special: Any) -> None:
    described = {"pattern": r"\p{L}+|\s+|[^\s\p{L}]+", "special_tokens": special["special"]}
    path.with_name(path.name + ".json").write_text(json.dumps(described))


@pytest.mark.parametrize("text", HOSTILE)
def test_tiktoken_text_stays_text(tiktoken_file: Path, text: str) -> None:
    give_pattern(tiktoken_file, special={"<|endoftext|>": 262, "<|fim_prefix|>": 263})
    loaded = load_tokenizer(
        schema.TokenizerSection(path=str(tiktoken_file), added_tokens="crystal")
    )
    ids = loaded.encode(text)
    assert not control_ids(loaded) & set(ids)
    assert loaded.decode(ids) == text
    assert ids == loaded.base.encoding.encode_ordinary(text)  # type: ignore[attr-defined]
    assert (
        loaded.eod_id,
        loaded.token_id("<|fim_prefix|>"),
        loaded.token_id("<|fim_middle|>"),
    ) == (262, 263, 264)


def test_tiktoken_asks_for_a_pattern_it_does_not_know(tiktoken_file: Path) -> None:
    with pytest.raises(UserError, match=r"splitting pattern; write it to tiny\.tiktoken\.json"):
        load_tokenizer(schema.TokenizerSection(path=str(tiktoken_file)))


def test_tiktoken_finds_a_published_pattern_by_hash(
    tiktoken_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constructor as tiktoken's own are written, for this file's hash; nothing may be downloaded."""
    published = pytest.importorskip("tiktoken_ext.openai_public")
    digest = hashlib.sha256(tiktoken_file.read_bytes()).hexdigest()
    exec(  # in the module, because that is where the constructors look up their loader
        f"def tiny():\n    ranks = load_tiktoken_bpe('https://nowhere.invalid/tiny', expected_hash='{digest}')\n"
        "    return {'pat_str': '.', 'mergeable_ranks': ranks, 'special_tokens': {'<|endoftext|>': 300}}\n",
        vars(published),
    )
    monkeypatch.setitem(published.ENCODING_CONSTRUCTORS, "tiny", published.tiny)
    try:
        assert load_tokenizer(schema.TokenizerSection(path=str(tiktoken_file))).eod_id == 300
    finally:
        del published.tiny


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_sentences(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.model").write_bytes(b"not a model")
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "vocab.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, expected in (
        ("nowhere.model", "no such tokenizer file"),
        ("bad.model", "not a SentencePiece model"),
        ("bad.json", "not a Hugging Face tokenizer.json"),
        ("vocab.txt", "set `tokenizer.kind`"),
        ("empty", r"no tokenizer\.json or tokenizer\.model"),
    ):
        with pytest.raises(UserError, match=expected):
            load_tokenizer(schema.TokenizerSection(path=str(tmp_path / path)))
    with pytest.raises(UserError, match="every name must be there once"):
        load_tokenizer(schema.TokenizerSection(path=str(model), added_tokens=["<a>", "<a>"]))
    with pytest.raises(UserError, match=r"no control token <\|fim_prefix\|>; add it"):
        load_tokenizer(schema.TokenizerSection(path=str(model))).token_id("<|fim_prefix|>")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    (tmp_path / "t.tiktoken").write_text("")
    with pytest.raises(UserError, match=r"needs `tiktoken`: pip install 'megacode\[tiktoken\]'"):
        load_tokenizer(schema.TokenizerSection(path=str(tmp_path / "t.tiktoken")))


def test_a_user_defined_symbol_cannot_be_a_control_token(tmp_path: Path) -> None:
    prefix = tmp_path / "u"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(prefix), vocab_size=420, model_type="bpe", byte_fallback=True,
        user_defined_symbols=["<|fim_prefix|>"], minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"<\|fim_prefix\|> is already an ordinary piece"):
        load_tokenizer(schema.TokenizerSection(path=f"{prefix}.model", added_tokens="crystal"))


# ------------------------------------------------------------------------------------------------------------ the verb


def test_the_verb_trains_from_files_and_its_mistakes_end_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"content": text}) + "\n" for text in CORPUS) + "broken\n")
    train = [
        "tokenizer",
        "train",
        str(source),
        "--vocab-size",
        "0.4k",
        "--output",
        str(tmp_path / "t.model"),
    ]
    assert main([*train, "--text-field", "content"]) == 0
    assert "1 bad" in capsys.readouterr().out
    assert load_tokenizer(schema.TokenizerSection(path=str(tmp_path / "t.model"))).vocab_size == 400
    for more, expected in (
        ((), "no text to train on: 4 × no field 'text', 1 × "),
        (("--text-field", "content", "--vocab-size", "90k"), "cannot train a tokenizer"),
        (("--vocab-size", "lots"), "--vocab-size: expected a count"),
        (("--output", str(tmp_path / "t.json")), "ends in .model"),
    ):
        assert main([*train, *more]) == 2
        assert expected in capsys.readouterr().err
