"""What comes in with a model goes out: chat templates, every id that ends a text, generation defaults, tokenizer.model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

transformers = pytest.importorskip("transformers")

from megacode.cli.main import main  # noqa: E402
from megacode.convert.kept import imported_facts, outgoing  # noqa: E402
from megacode.convert.tokenizer_files import write_tokenizer  # noqa: E402
from megacode.errors import UserError  # noqa: E402
from megacode.recipe import schema  # noqa: E402
from megacode.recipe.load import load_recipe  # noqa: E402
from megacode.run.history import Start, initial_start  # noqa: E402
from megacode.tokenizer.tokenizer import load_tokenizer  # noqa: E402
from tests.convert.test_tokenizer_files import byte_level, own_model  # noqa: E402, F401

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "repetition_penalty": 1.05,
}


def chat_model(folder: Path, template_file: bool) -> Path:
    """An instruction model as the families publish them; ends on either of two tokens."""
    folder.mkdir(parents=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(byte_level(folder, SPECIAL, [])), eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], model_max_length=4096,
    )  # fmt: skip
    if template_file:
        tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "tools " + TEMPLATE}
    tokenizer.save_pretrained(folder)
    if not template_file:  # as transformers wrote it before chat_template.jinja
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")]
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=ends, pad_token_id=ends[0],
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[0], **GENERATION
    )
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> dict[str, Any]:
    """What transformers makes of a folder, as far as it matters to who writes with it."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    defaults = transformers.GenerationConfig.from_pretrained(folder).to_diff_dict()
    talk = [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "(x)"}]
    config = transformers.AutoConfig.from_pretrained(folder)
    return {
        "generation": {key: value for key, value in defaults.items() if key != "transformers_version"},
        "config ids": {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "ends": (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length),
        "talk": tokenizer.apply_chat_template(talk, tokenize=False),
        "tools": tokenizer.apply_chat_template(talk, tokenize=False, chat_template="tool_use")
        if isinstance(tokenizer.chat_template, dict) else None,
    }  # fmt: skip


@pytest.mark.parametrize("template_file", [True, False])
def test_a_chat_model_goes_out_as_it_came(
    tmp_path: Path, template_file: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = chat_model(tmp_path / "hf", template_file)
    (folder / "tokenizer.model").write_bytes(b"as it was")
    assert main(["import", str(folder), str(tmp_path / "in")]) == 0
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    before, after = loaded(folder), loaded(tmp_path / "out")
    assert (
        before == after
        and len(after["generation"]["eos_token_id"]) == 2
        and before["talk"].startswith("<|im_start|>user")
    )
    assert (before["tools"] is not None) == template_file
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"as it was"
    assert {path.name for path in folder.iterdir()} <= {
        path.name for path in (tmp_path / "out").iterdir()
    } | {"m.model"}


def test_a_run_hands_on_what_its_first_weights_came_with(tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "hf", True)
    assert main(["import", str(folder), str(tmp_path / "in")]) == 0
    imported = json.loads((tmp_path / "in" / "megacode.json").read_text())["imported"]
    assert imported["generation"]["temperature"] == 0.6
    recipe = load_recipe(tmp_path / "in" / "recipe.yaml")
    begun = recipe.model_copy(update={"initialize_from": str(tmp_path / "in")})
    assert initial_start(begun).facts() == {"accepted": [], "imported": imported}
    resumed = Start(step=3, info={"step": 3, "imported": imported})
    assert resumed.facts() == {"accepted": [], "imported": imported}
    assert initial_start(recipe).facts() == {"accepted": []}


def test_ids_of_another_tokenizer_are_not_kept_and_said(tmp_path: Path, own_model: Path) -> None:
    tokenizer = load_tokenizer(schema.TokenizerSection(path=str(own_model)))
    ends = {"eos_token_id": [601, 602]}
    imported = {"ids": ends, "generation": {"temperature": 0.6, **ends}, "tokenizer": "0"}
    own = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    about = outgoing(imported, own, tokenizer)
    assert about.ids == own and about.generation == {
        "do_sample": True,
        "temperature": 0.6,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert about.note and "eos_token_id [601, 602]" in about.note
    chat = outgoing(None, own, tokenizer, chats=True)
    assert chat.generation == {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True}
    assert "do_sample" not in outgoing(None, own, tokenizer).generation
    same = outgoing({**imported, "tokenizer": None}, own, tokenizer)
    assert (
        same.ids["eos_token_id"] == [601, 602] == same.generation["eos_token_id"]
        and same.note is None
    )
    assert outgoing(None, own, tokenizer).generation == {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_a_converter_finds_scores_and_every_control_token(tmp_path: Path, own_model: Path) -> None:
    """As llama.cpp's reads them: pieces and scores from tokenizer.model, the ids beyond from `added_tokens_decoder`."""
    section = schema.TokenizerSection(path=str(own_model), added_tokens="crystal")
    tokenizer = load_tokenizer(section)
    write_tokenizer(section, tmp_path, tokenizer.vocab_size)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert len({pieces.get_score(i) for i in range(pieces.vocab_size())}) > 100
    decoder = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    beyond = range(pieces.vocab_size(), tokenizer.vocab_size)
    names = {token: name for name, token in tokenizer.control_tokens.items()}
    assert [decoder[str(i)]["content"] for i in beyond] == [names[i] for i in beyond] and len(
        beyond
    ) == 32
    assert all(decoder[str(i)]["special"] for i in beyond)


def test_a_template_that_is_a_link_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "hf", False)
    (tmp_path / "secret").write_text("x")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    assert main(["import", str(folder), str(tmp_path / "in")]) == 0
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read"):
        imported_facts(folder, {}, None)
