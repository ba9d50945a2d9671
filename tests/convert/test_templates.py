"""The chat template of an export: which one it has, and that transformers renders it as megacode does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from megacode.cli.main import main  # noqa: E402
from megacode.convert.kept import outgoing  # noqa: E402
from megacode.convert.templates import (  # noqa: E402
    template_of_export,
    template_of_run,
    turn_end_of,
)
from megacode.convert.tokenizer_files import token_ids, write_tokenizer  # noqa: E402
from megacode.errors import UserError  # noqa: E402
from megacode.recipe.schema import Model, Recipe, Source, TokenizerSection  # noqa: E402
from megacode.tokenizer.chat import BUILT_IN  # noqa: E402
from megacode.tokenizer.tokenizer import load_tokenizer  # noqa: E402
from tests.convert.models import recipe_of  # noqa: E402
from tests.convert.test_kept import TEMPLATE, chat_model  # noqa: E402
from tests.convert.test_tokenizer_files import own_model  # noqa: E402, F401

TALK = [
    {"role": "system", "content": "Be brief"},
    {"role": "user", "content": " Was ist  2+2?\n"},
    {"role": "assistant", "content": "It is 4. 🦙"},
    {"role": "user", "content": "Sure?"},
]
LLAMA = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


class Chats(Source):
    """A source of conversations."""

    loss_on: str | None = None


def plain(**sources: Source) -> Recipe:
    recipe = recipe_of(Model(layers=1, hidden_size=64, heads=4))
    return recipe.model_copy(update={"sources": {**recipe.sources, **sources}})


@pytest.mark.parametrize("name", [*BUILT_IN, "a file"])
def test_transformers_renders_what_megacode_does(
    name: str, own_model: Path, tmp_path: Path
) -> None:
    added = LLAMA if name == "llama-3" else "crystal"
    section = TokenizerSection(path=str(own_model), added_tokens=added, bos=True)
    tokenizer = load_tokenizer(section)
    if name == "a file":
        name = str(tmp_path / "my.jinja")
        Path(name).write_text(TEMPLATE)
    template, is_other = template_of_export(plain(), tokenizer, name)
    assert template and is_other
    write_tokenizer(section, tmp_path / "out", tokenizer.vocab_size, template.text)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for talk, prompt in ((TALK, True), (TALK[:3], False)):
        given = dict(tokenize=False, add_generation_prompt=prompt)
        assert loaded.apply_chat_template(talk, **given) == template.render(
            talk, add_generation_prompt=prompt
        )
    end, note = turn_end_of(template, tokenizer)
    about = outgoing(None, token_ids(tokenizer), tokenizer, end)
    other = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}.get(name, "<|im_end|>")
    if name in ("crystal", "alpaca", "plain"):  # end with EOS
        assert about.generation["eos_token_id"] == end == tokenizer.eod_id
        assert about.generation["_from_model_config"]
    else:
        assert about.generation["eos_token_id"] == [tokenizer.eod_id, tokenizer.token_id(other)]
        assert "_from_model_config" not in about.generation
    assert note is None and about.ids["eos_token_id"] == tokenizer.eod_id


def test_what_lies_beside_a_tokenizer_is_carried_or_replaced(
    own_model: Path, tmp_path: Path
) -> None:
    beside = tmp_path / "t"
    beside.mkdir()
    (beside / "tokenizer.model").write_bytes(own_model.read_bytes())
    section = TokenizerSection(path=str(beside / "tokenizer.model"), added_tokens="crystal")
    tokenizer = load_tokenizer(section)
    assert template_of_export(plain(), tokenizer, None) == (None, False), "a base model has none"
    (beside / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    template, is_other = template_of_export(plain(), tokenizer, None)
    assert template and template.text == TEMPLATE and not is_other
    for number, text in enumerate((None, "{{ messages[0].content }}")):
        out = tmp_path / str(number)
        write_tokenizer(section, out, tokenizer.vocab_size, text)
        loaded = transformers.AutoTokenizer.from_pretrained(out)
        assert loaded.chat_template == (text or TEMPLATE)
        assert (text is None) == ("chat_template" in (out / "tokenizer_config.json").read_text())


def test_the_template_of_a_run_is_that_of_its_conversations(tmp_path: Path) -> None:
    def source(name: str, template: str | None, loss_on: str | None = "answers") -> Chats:
        prefix = tmp_path / name
        more: dict[str, Any] = {} if template is None else {"chat template": template}
        prefix.with_suffix(".json").write_text(json.dumps({"kind": "megacode dataset", **more}))
        prefix.with_suffix(".idx").touch()
        return Chats(path=str(prefix), loss_on=loss_on)

    assert template_of_run(plain(a=source("a", "one", loss_on=None))) is None
    assert template_of_run(plain(a=source("a", "one"), unread=source("b", "two"))) == "one"
    with pytest.raises(UserError, match=r"sources\.a: no manifest .* --chat-template"):
        template_of_run(plain(a=source("a", None)))
    with pytest.raises(UserError, match=r"sources\.a: no manifest"):
        template_of_run(plain(a=Chats(path=str(tmp_path / "gone"), loss_on="last_answer")))
    both = plain(a=source("a", "one"))
    several = source("c", "two").model_copy(update={"path": [str(tmp_path / n) for n in "ac"]})
    with pytest.raises(UserError, match=r"different chat templates \(a; a\); choose one"):
        template_of_run(both.model_copy(update={"sources": {"a": several}}))


def test_the_verb_says_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(chat_model(tmp_path / "hf", True)), str(tmp_path / "in")]) == 0
    export = ["export", str(tmp_path / "in"), str(tmp_path / "out"), "--chat-template"]
    for arguments, said in (
        (["vicuna"], "--chat-template vicuna: give one of chatml"),
        (["llama-3"], "--chat-template llama-3: writes <|end_header_id|>"),
        (["chatml", "--no-tokenizer"], "--chat-template: goes with a tokenizer"),
    ):
        assert main([*export, *arguments]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*export, "chatml"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "chat_template.jinja" in names and "additional_chat_templates" not in names
