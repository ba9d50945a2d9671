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
from megacode.files import inside
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
    imported: Mapping[str, Any] | None, own: Mapping[str, Any], tokenizer: Tokenizer | None
) -> Outgoing:
    """Ids and defaults of an export.

    Args:
        imported: what the weights came with; None for those that were trained from nothing.
        own: `IDS` as the recipe's tokenizer has them.
        tokenizer: the recipe's, where it can be read.
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
    if generation:
        return Outgoing(ids, {**known, **generation}, note)
    return Outgoing(ids, {"_from_model_config": True, **known}, note)


def tokenizer_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """Keys of the tokenizer_config.json beside a Hugging Face tokenizer that an export keeps."""
    config = tokenizer.path.with_name("tokenizer_config.json")
    if tokenizer.kind != "huggingface" or not config.is_file():
        return {}
    found = json.loads(config.read_text(encoding="utf-8"))
    return {key: found[key] for key in _CONFIG_KEYS if found.get(key) is not None}


def copy_companions(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy chat templates and the SentencePiece model from beside the tokenizer's file.

    Converters to other formats, such as GGUF, take the scores of pieces from tokenizer.model.

    Raises:
        UserError: one of them is a link that leads elsewhere.
    """
    place = tokenizer.path.parent
    names = ["tokenizer.model", "chat_template.jinja"]
    if tokenizer.kind == "sentencepiece":
        # Named by the recipe, wherever it leads.
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
        names = []
    if tokenizer.kind == "huggingface":
        templates = (place / "additional_chat_templates").glob("*.jinja")
        names += [str(path.relative_to(place)) for path in templates]
    for name in names:
        if (place / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(inside(place, name, str(place)), folder / name)


def _digest(tokenizer: Tokenizer | None) -> str | None:
    return hashlib.sha256(tokenizer.path.read_bytes()).hexdigest() if tokenizer else None
