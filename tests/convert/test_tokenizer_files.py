"""Tokenizer files that `AutoTokenizer` loads with megacode's ids, whatever the text; and what cannot be said is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

transformers = pytest.importorskip("transformers")

from megacode.convert.tokenizer_files import (  # noqa: E402
    FILES,
    SAMPLE,
    loads_differently,
    prove,
    read_tokenizer,
    token_ids,
    write_tokenizer,
)
from megacode.convert.tokenizer_json import tokenizer_json  # noqa: E402
from megacode.errors import UserError  # noqa: E402
from megacode.recipe import schema  # noqa: E402
from megacode.tokenizer.tokenizer import CRYSTAL_TOKENS, Tokenizer, load_tokenizer  # noqa: E402
from megacode.tokenizer.training import train_tokenizer  # noqa: E402
from tests.tokenizer.test_tokenizer import CORPUS, HOSTILE  # noqa: E402

SOURCE = Path(__file__).read_text() + Path(prove.__code__.co_filename).read_text()
TEXTS = [
    *HOSTILE,
    *SAMPLE,
    SOURCE,
    " ".join(CORPUS),
    "Ünïcode " * 50,
    "if x:\n" + "\t" * 9 + "y = '" + "=" * 77 + "'",
]


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "t.model"
    train_tokenizer([*CORPUS, SOURCE], path, vocab_size=700)
    return path


def spm(folder: Path, **keys: Any) -> Path:
    usual: dict[str, Any] = dict(
        vocab_size=700, model_type="bpe", byte_fallback=True, hard_vocab_limit=False
    )
    usual |= dict(normalization_rule_name="identity", minloglevel=2, max_sentence_length=10**6)
    texts = keys.pop("texts", [*CORPUS, SOURCE])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "m"), **(usual | keys)
    )
    return folder / "m.model"


def byte_level(folder: Path, special: list[str], ordinary: list[str]) -> Path:
    """A byte-level tokenizer.json as Qwen's, by the library's own trainer."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([*CORPUS, SOURCE], trainer)
    made.add_tokens([tokenizers.AddedToken(name, special=False) for name in ordinary])
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def tiktoken_file(folder: Path, pattern: str = r"\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+") -> Path:
    pieces = [bytes([i]) for i in range(256)]
    pieces += [
        b"he",
        b"ll",
        b"hell",
        b"hello",
        b" w",
        b"==",
        b"====",
        b"re",
        b"ret",
        b"return",
        b"se",
        b"self",
    ]
    path = folder / "tiny.tiktoken"
    path.write_text(
        "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(pieces))
    )
    special = {"<|endoftext|>": len(pieces), "<|fim_prefix|>": len(pieces) + 1}
    path.with_name(path.name + ".json").write_text(
        json.dumps({"pattern": pattern, "special_tokens": special})
    )
    return path


def check(section: schema.TokenizerSection, folder: Path) -> tuple[Tokenizer, Any]:
    """Write, load with AutoTokenizer, and compare every text; returns both tokenizers."""
    tokenizer = load_tokenizer(section)
    write_tokenizer(section, folder, tokenizer.vocab_size)
    ids = token_ids(tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    start = [tokenizer.bos_id] if section.bos else []
    for text in TEXTS:
        expected = tokenizer.encode(text)
        assert (
            loaded(text, add_special_tokens=False, split_special_tokens=True).input_ids == expected
        ), text[:80]
        if not any(name in text for name in tokenizer.control_tokens):
            assert loaded(text).input_ids == start + expected, text[:80]
    for name, token in tokenizer.control_tokens.items():
        assert loaded.convert_tokens_to_ids(name) == token
        assert loaded(f"x{name}", add_special_tokens=False).input_ids[-1] == token, (
            "found in text, as users expect"
        )
        assert loaded.decode([token], skip_special_tokens=True) == ""
    assert loaded.bos_token_id == ids["bos_token_id"] == tokenizer.base.bos_id
    assert loaded.eos_token_id == ids["eos_token_id"] == tokenizer.base.eod_id
    assert loaded.pad_token_id == ids["pad_token_id"] == tokenizer.pad_id
    assert len(loaded) == tokenizer.vocab_size and loaded.chat_template is None
    return tokenizer, loaded


@pytest.mark.parametrize("bos", [True, False])
def test_own_sentencepiece_with_crystals_tokens(own_model: Path, tmp_path: Path, bos: bool) -> None:
    section = schema.TokenizerSection(path=str(own_model), added_tokens="crystal", bos=bos)
    tokenizer, loaded = check(section, tmp_path)
    assert loaded.convert_tokens_to_ids(list(CRYSTAL_TOKENS)) == list(range(700, 732))
    assert loaded.decode(tokenizer.encode(SOURCE)) == SOURCE
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "tokenizer.model"])
    assert (tmp_path / "tokenizer.model").read_bytes() == own_model.read_bytes()


@pytest.mark.parametrize(
    "keys",
    [
        {"add_dummy_prefix": True, "remove_extra_whitespaces": False},  # Llama
        {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": True, "byte_fallback": False},
        {
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "user_defined_symbols": ["<ud>", "x y"],
        },
        {
            "model_type": "unigram",
            "add_dummy_prefix": True,
            "remove_extra_whitespaces": False,
            "pad_id": 3,
        }
        | {
            "texts": [line.strip("=- ") for line in SOURCE.splitlines() if "==" not in line],
            "vocab_size": 400,
        },
    ],
    ids=["llama", "trimmed", "no-bytes", "user-defined", "unigram"],
)
def test_sentencepiece_settings(tmp_path: Path, keys: dict[str, Any]) -> None:
    check(
        schema.TokenizerSection(path=str(spm(tmp_path, **keys)), added_tokens="crystal"),
        tmp_path / "out",
    )


def test_the_proof_refuses_what_differs(own_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(schema.TokenizerSection(path=str(own_model), added_tokens="crystal"))
    contents = tokenizer_json(tokenizer, bos=False)
    prove(tokenizer, json.dumps(contents), bos=False)
    for spoil in (
        lambda c: c["model"]["merges"].reverse(),
        lambda c: c["added_tokens"].pop(),
        lambda c: c["normalizer"]["normalizers"].insert(0, {"type": "NFC"}),
        lambda c: c["model"].update(byte_fallback=False),
    ):
        spoilt = json.loads(json.dumps(contents))
        spoil(spoilt)
        with pytest.raises(UserError, match=r"t\.model: cannot be said"):
            prove(tokenizer, json.dumps(spoilt), bos=False)
    folder = tmp_path / "out"
    with pytest.raises(
        UserError, match="cannot be said exactly"
    ):  # of equally likely pieces each library takes others
        model = spm(
            tmp_path,
            model_type="unigram",
            remove_extra_whitespaces=False,
            texts=["=" * 16 + " a b", "==="] * 9,
        )
        write_tokenizer(schema.TokenizerSection(path=str(model)), folder, 2000)
    with pytest.raises(
        UserError, match="cannot be said exactly"
    ):  # its normaliser works on other units of text
        model = spm(tmp_path, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=False)
        write_tokenizer(schema.TokenizerSection(path=str(model)), folder, 2000)
    assert not folder.exists()


@pytest.mark.parametrize("bos", [True, False])
def test_huggingface_files_as_qwens(tmp_path: Path, bos: bool) -> None:
    path = byte_level(tmp_path, ["<|endoftext|>", "<s>"], ["<|fim_prefix|>", "<think>"])
    tokenizer, loaded = check(
        schema.TokenizerSection(path=str(path), added_tokens="crystal", bos=bos), tmp_path / "out"
    )
    think = tokenizer.base.literal["<think>"]
    assert loaded("a<think>b").input_ids.count(think) == 1 and think in tokenizer.encode(
        "a<think>b"
    )
    again = load_tokenizer(schema.TokenizerSection(path=str(tmp_path / "out")))
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_tiktoken(tmp_path: Path) -> None:
    check(
        schema.TokenizerSection(path=str(tiktoken_file(tmp_path)), added_tokens="crystal"),
        tmp_path / "out",
    )
    (tmp_path / "gaps").mkdir()
    path = tiktoken_file(
        tmp_path / "gaps", pattern=r"\p{L}+|\s+"
    )  # what it does not match is left out
    check(schema.TokenizerSection(path=str(path)), tmp_path / "gaps" / "out")


@pytest.mark.parametrize(
    "model_type",
    ["llama", "mistral", "qwen3", "stablelm", "gpt_neox", "starcoder2", "crystalcoder"],
)
def test_the_models_family_does_not_change_the_ids(
    own_model: Path, tmp_path: Path, model_type: str
) -> None:
    """AutoTokenizer looks at config.json too, and has classes of its own for some families."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 732}))
    check(schema.TokenizerSection(path=str(own_model), added_tokens="crystal", bos=True), tmp_path)


def test_a_family_whose_tokenizer_class_is_fixed_is_told(own_model: Path, tmp_path: Path) -> None:
    """Transformers 5 gives every qwen2 folder Qwen's way of splitting text."""
    config = json.dumps({"model_type": "qwen2", "vocab_size": 732})
    (tmp_path / "config.json").write_text(config)
    section = schema.TokenizerSection(path=str(own_model), added_tokens="crystal", bos=True)
    tokenizer = load_tokenizer(section)
    write_tokenizer(section, tmp_path, 732)
    note = loads_differently(section, tmp_path)
    assert (note is not None) == (int(transformers.__version__.split(".")[0]) >= 5)
    assert note is None or "PreTrainedTokenizerFast.from_pretrained" in note
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert [loaded(text, split_special_tokens=True).input_ids for text in TEXTS] == [
        [1, *tokenizer.encode(text)] for text in TEXTS
    ]
    (tmp_path / "config.json").write_text(config.replace("qwen2", "llama"))
    assert loads_differently(section, tmp_path) is None


def test_a_tokenizer_larger_than_the_model_is_refused(own_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 732 tokens and the model only 731"):
        write_tokenizer(
            schema.TokenizerSection(path=str(own_model), added_tokens="crystal"),
            tmp_path / "out",
            731,
        )
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- import


@pytest.mark.parametrize("bos", [True, False])
def test_what_was_written_is_read_as_it_was(own_model: Path, tmp_path: Path, bos: bool) -> None:
    section = schema.TokenizerSection(path=str(own_model), added_tokens="crystal", bos=bos)
    write_tokenizer(section, tmp_path, 732)
    read, note = read_tokenizer(tmp_path, 732)
    assert note is None and read.bos is bos and read.eod
    again, tokenizer = load_tokenizer(read), load_tokenizer(section)
    assert (again.bos_id, again.eod_id, again.vocab_size) == (1, 2, 732)
    assert again.control_tokens == tokenizer.control_tokens
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    (tmp_path / "tokenizer_config.json").write_text(
        "{}"
    )  # then the file itself says whether BOS comes first
    assert read_tokenizer(tmp_path, 732)[0].bos is bos


def test_rows_without_a_token_are_named(own_model: Path, tmp_path: Path) -> None:
    write_tokenizer(schema.TokenizerSection(path=str(own_model)), tmp_path, 800)
    read, note = read_tokenizer(tmp_path, 800)
    assert note and "has 700 tokens and the model 800 rows; the last 100" in note
    assert load_tokenizer(read).vocab_size == 800
    with pytest.raises(UserError, match=r"has 700 tokens, but config\.json says vocab_size 699"):
        read_tokenizer(tmp_path, 699)


def test_a_llama_folder_with_only_a_sentencepiece_file(own_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(own_model.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer"})
    )
    path = str(tmp_path / "tokenizer.model")
    assert read_tokenizer(tmp_path, 700)[0] == schema.TokenizerSection(path=path, bos=True)
    with pytest.raises(UserError, match=r"no tokenizer\.json or tokenizer\.model"):
        read_tokenizer(tmp_path.parent, 700)
