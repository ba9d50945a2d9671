"""What comes in with a Hugging Face model and goes out again with an export of it or its runs.

What is said of the weights travels with them, as `imported` in every checkpoint's megacode.json:
ids of special tokens (a model may end on several) and the defaults of generation. What belongs to
the tokenizer stays beside its file: chat templates, the SentencePiece model, the longest input.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.files import inside, write_text
from megacode.tokenizer.tokenizer import Tokenizer

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION = "generation_config.json"
_ABOUT_THE_FILE = ("transformers_version", "_from_model_config")
_CONFIG_KEYS = ("chat_template", "model_max_length", "padding_side")


@dataclass(frozen=True)
class Outgoing:
    """Of an export.

    Attributes:
        ids: `IDS` for config.json; None where there is none, a list where there are several.
        generation: generation_config.json.
        note: what was not kept, and why.
    """

    ids: dict[str, Any]
    generation: dict[str, Any]
    note: str | None = None


def imported_facts(
    folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """`imported` of the checkpoint that a Hugging Face folder becomes.

    Raises:
        UserError: its generation_config.json is not one.
    """
    path, generation = folder / GENERATION, {}
    if path.is_file():
        try:
            text = inside(folder, GENERATION, str(folder)).read_text(encoding="utf-8")
            found = dict(json.loads(text)).items()
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); download the file again, or remove it"
            ) from None
        generation = {key: value for key, value in found if key not in _ABOUT_THE_FILE}
    return {
        "ids": {key: config[key] for key in IDS if config.get(key) is not None},
        "generation": generation,
        "tokenizer": _digest(tokenizer),
    }


def outgoing(
    imported: Mapping[str, Any] | None,
    own: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    turn_end: int | None = None,
    chats: bool = False,
) -> Outgoing:
    """Ids and defaults of an export.

    Args:
        imported: what the weights came with; None for those that were trained from nothing.
        own: `IDS` as the recipe's tokenizer has them.
        tokenizer: the recipe's, where it can be read.
        turn_end: the token that ends a turn in the chat template; generation ends there, too.
        chats: it has a chat template; then it samples if nothing else is said, without which
            `transformers serve` disregards the temperature that a request asks for.
    """
    ids, generation, note = {}, {}, None
    if imported:
        ids, generation = dict(imported["ids"]), dict(imported["generation"])
        if imported["tokenizer"] and tokenizer and imported["tokenizer"] != _digest(tokenizer):
            foreign = generation | ids
            listed = ", ".join(f"{key} {foreign[key]}" for key in IDS if key in foreign)
            note = (
                f"{tokenizer.path} is not the tokenizer that the model was imported with, so the "
                f"special token ids from there are not kept ({listed}); the export has this "
                "tokenizer's"
            )
            ids = {}
            generation = {k: v for k, v in generation.items() if not k.endswith("_token_id")}
    ids = {**own, **ids}
    known = {key: value for key, value in ids.items() if value is not None}
    written = {**known, **generation} if generation else {"_from_model_config": True, **known}
    ends = written.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    if turn_end is not None and turn_end not in ends:
        written["eos_token_id"] = [*ends, turn_end] if ends else turn_end
        written.pop("_from_model_config", None)
    if chats or written.keys() & {"temperature", "top_p"}:  # without it they have no effect
        written.setdefault("do_sample", True)
        written.pop("_from_model_config", None)
    return Outgoing(ids, written, note)


def tokenizer_settings(tokenizer: Tokenizer, template: str | None = None) -> dict[str, Any]:
    """Keys of the tokenizer_config.json beside the tokenizer's file that an export keeps.

    Args:
        template: the text of another chat template than the one beside it.
    """
    config = tokenizer.path.with_name("tokenizer_config.json")
    if not config.is_file():
        return {}
    found = json.loads(config.read_text(encoding="utf-8"))
    if template is not None:
        found.pop("chat_template", None)
    return {key: found[key] for key in _CONFIG_KEYS if found.get(key) is not None}


def copy_companions(tokenizer: Tokenizer, folder: Path, template: str | None = None) -> None:
    """Copy chat templates and the SentencePiece model from beside the tokenizer's file.

    Converters to other formats, such as GGUF, take the scores of pieces from tokenizer.model.

    Args:
        template: the text of a chat template, written instead of those beside it.

    Raises:
        UserError: one of them is a link that leads elsewhere.
    """
    place, names = tokenizer.path.parent, ["tokenizer.model"]
    if tokenizer.kind == "sentencepiece":
        # Named by the recipe, wherever it leads.
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
        names = []
    if template is None:
        templates = (place / "additional_chat_templates").glob("*.jinja")
        names += ["chat_template.jinja", *(str(path.relative_to(place)) for path in templates)]
    else:
        write_text(folder / "chat_template.jinja", template)
    for name in names:
        if (place / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(inside(place, name, str(place)), folder / name)


def _digest(tokenizer: Tokenizer | None) -> str | None:
    return hashlib.sha256(tokenizer.path.read_bytes()).hexdigest() if tokenizer else None
