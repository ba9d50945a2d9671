"""A Hugging Face folder -> a checkpoint that a run starts from, tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megacode.convert.checkpoint_writer import CheckpointWriter
from megacode.convert.families import by_architecture
from megacode.convert.family import Family
from megacode.convert.kept import imported_facts
from megacode.convert.layout import EMBEDDING, OUTPUT, Slot, padded, shape
from megacode.convert.new_folder import new_folder
from megacode.convert.safetensors_files import TYPES, HuggingFaceWeights, overflows
from megacode.errors import UserError
from megacode.recipe.checks import check_recipe
from megacode.recipe.load import dump_recipe
from megacode.recipe.schema import (
    LearningRate,
    Mixture,
    Model,
    Phase,
    Precision,
    Recipe,
    Source,
    TokenizerSection,
)
from megacode.run.checkpoints import INFO
from megacode.tokenizer.tokenizer import Tokenizer, load_tokenizer

_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|(attention|attn)\.(bias|masked_bias))$")
"""Tensors of older files that are no weights."""


@dataclass(frozen=True)
class Found:
    """A Hugging Face folder that can be imported; `head_note` says if its head is no tied one."""

    folder: Path
    config: Mapping[str, Any]
    family: Family
    model: Model
    vocab_size: int
    weights: HuggingFaceWeights
    head_note: str | None = None

    @classmethod
    def open(cls, folder: Path) -> Found:
        """UserError: no config.json, another architecture, something that cannot be expressed, or
        weights that are not those of config.json."""
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{folder}: has no config.json; give a Hugging Face model's folder"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); download the file again") from error
        architectures, model_type = config.get("architectures") or [], config.get("model_type", "")
        family = by_architecture(architectures, model_type, str(path))
        try:
            vocab_size = int(config["vocab_size"])
            model = Model(**family.model_section(config), vocab_size=vocab_size)
        except UserError as error:
            raise UserError(str(error).replace("config.json", str(path), 1)) from None
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{path}: {str(error).splitlines()[0]}; give a Hugging Face model's whole folder"
            ) from error
        weights = HuggingFaceWeights.open(folder)
        found = cls(folder, config, family, model, vocab_size, weights)._with_own_head()
        for problem in check_recipe(starting_recipe(found, None, torch.float32)):
            raise UserError(f"{path}: describes a model that cannot be built: {problem}")
        found._check_names()
        return found

    def slots(self) -> list[Slot]:
        return list(self.family.slots(self.model))

    def _with_own_head(self) -> Found:
        """With `tie_embeddings: false` where config.json says tied and the files hold an output
        layer that is another matrix: as transformers since version 5; older ones drop it."""
        if not self.model.tie_embeddings:
            return self
        untied = self.model.model_copy(update={"tie_embeddings": False})
        names = {slot.key: slot.names[0] for slot in self.family.slots(untied)}
        head, embedding = names[OUTPUT], names[EMBEDDING]
        if not {head, embedding} <= self.weights.files.keys():
            return self
        if torch.equal(self.weights.tensor(head).float(), self.weights.tensor(embedding).float()):
            return self
        note = (
            f"{head} differs from {embedding}, though config.json says tie_word_embeddings: true; "
            "both are imported (tie_embeddings: false), as transformers 5 does, and earlier "
            "versions would drop the first"
        )
        return replace(self, model=untied, head_note=note)

    def _check_names(self) -> None:
        """Every weight has a place and every place a weight, before anything is written."""
        there = self.weights.files.keys()
        wanted = {name for slot in self.slots() for name in slot.names}
        if missing := sorted(wanted - there):
            raise UserError(
                f"{self.folder}: has no tensor {missing[0]}; "
                "its files and its config.json belong to different models"
            )
        if left := sorted(there - wanted - {*self._tied_heads(), *self._buffers()}):
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise UserError(
                f"{self.folder}: the tensor {left[0]} has no place in a {self.family.name} model "
                f"as config.json describes it{more}"
            )

    def _tied_heads(self) -> list[str]:
        """Output layers in the files that are the embedding's matrix once more."""
        tied = ("lm_head.weight", "embed_out.weight") if self.model.tie_embeddings else ()
        return [name for name in tied if name in self.weights.files]

    def _buffers(self) -> list[str]:
        return sorted(name for name in self.weights.files if _BUFFERS.search(name))

    def notes(self) -> list[str]:
        """What the import passes over or changes, in sentences."""
        window, length = self.model.context_length, self.config.get("max_position_embeddings")
        notes = [self.head_note] if self.head_note else []
        if window and length and window < length:
            notes.append(
                f"some layers have a window of {window:,} tokens, which a recipe cannot say: "
                f"context_length is {window:,} instead of {length:,}, where both are the same"
            )
        notes += [
            f"{name} is the embedding once more (tied), left out" for name in self._tied_heads()
        ]
        if found := self._buffers():
            what = "buffer, which is no weight" if len(found) == 1 else "buffers, no weights"
            notes.append(f"left out: {len(found):,} {what} ({found[0]})")
        kinds = [self._kinds[name][0] for slot in self.slots() for name in slot.names]
        if others := [kind for kind in kinds if TYPES[kind] != self.dtype]:
            names, dtype = ", ".join(sorted(set(others))), str(self.dtype).removeprefix("torch.")
            are = "is" if len(others) == 1 else "are"
            notes.append(f"{len(others):,} of {len(kinds):,} tensors {are} {names}, now {dtype}")
        return notes

    def info(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """megacode.json of the checkpoint that it becomes, but for the tokenizer's facts.

        Args:
            tokenizer: the folder's own.
        """
        return {
            "step": 0,
            "recipe": starting_recipe(self, None, self.dtype).name,
            "phase": None,
            "tokens": 0,
            "vocab_size": self.vocab_size,
            "imported_from": self.folder.name,
            "family": self.family.name,
            "imported": imported_facts(self.folder, self.config, tokenizer),
        }

    def tensor(self, slot: Slot) -> torch.Tensor:
        """The Megatron-Core tensor of a slot, without padding.

        UserError: a shape is wrong, or a number too large.
        """
        parts = [self._cast(name) for name in slot.names]
        size = shape(self.model, self.vocab_size, slot.key, self.model.context_length or 0)
        wanted = slot.form.split(self.model, torch.empty(size, device="meta"))
        for name, part, empty in zip(slot.names, parts, wanted, strict=True):
            if part.shape != empty.shape:
                raise UserError(
                    f"{self.folder}: {name} has shape {tuple(part.shape)}, and config.json asks "
                    f"for {tuple(empty.shape)}; they belong to different models"
                )
        return slot.form.join(self.model, parts)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The one type of the checkpoint: that of most of the weights' bytes.

        Norms are often kept in another. UserError: some have a type that is none of weights to go
        on with, such as quantized ones.
        """
        kinds, held = self._kinds, dict.fromkeys(TYPES, 0)
        for name in sorted({name for slot in self.slots() for name in slot.names}):
            kind, count = kinds[name]
            if kind not in TYPES:
                raise UserError(
                    f"{self.folder}: {name} is of type {kind}, and only fp32, bf16 and fp16 can "
                    "be imported; save the model in one of them first"
                )
            held[kind] += count * TYPES[kind].itemsize
        return TYPES[max(held, key=lambda kind: held[kind])]

    @cached_property
    def _kinds(self) -> dict[str, tuple[str, int]]:
        return self.weights.kinds()

    def _cast(self, name: str) -> torch.Tensor:
        stored = self.weights.tensor(name)
        tensor = stored.to(self.dtype)
        if overflows(stored, tensor):
            raise UserError(
                f"{self.folder}: {name} has numbers beyond 65,504, the largest of fp16, which most "
                "of its weights are in; save the model in bf16 or fp32 first"
            )
        return tensor


def import_model(
    found: Found,
    out: Path,
    tokenizer: TokenizerSection | None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Recipe:
    """Write the checkpoint folder, whole or not at all, with a recipe to start from in it.

    Returns:
        that recipe: the model, the tokenizer if there is one, and a phase of continued pre-training
        to be filled in.

    Raises:
        UserError: a weight does not fit, or `out` cannot be written.
    """
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    with new_folder(out) as temporary:
        writer = CheckpointWriter(temporary, found.model.layers)
        for slot in found.slots():
            tensor = padded(found.model, slot.key, found.tensor(slot))
            writer.add(slot.key, slot.layer, tensor)
            on_bytes(tensor.nbytes)
        writer.finish()
        recipe = starting_recipe(found, tokenizer, found.dtype)
        (temporary / "recipe.yaml").write_text(dump_recipe(recipe))
        info = {**found.info(loaded), "tokenizer": loaded.facts() if loaded else None}
        (temporary / INFO).write_text(json.dumps(info, indent=1))
    return recipe


def starting_recipe(found: Found, tokenizer: TokenizerSection | None, dtype: torch.dtype) -> Recipe:
    """Continued pre-training on a corpus to be named: what one extends."""
    length = min(found.model.context_length or 2048, 4096)
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", found.folder.resolve().name).lstrip("_.-") or "imported"
    phase = Phase(
        name="continue",
        steps=1000,
        batch_size=64,
        sequence_length=length,
        mixture=Mixture.model_validate({"sources": {"corpus": 1.0}}),
        learning_rate=LearningRate(schedule="cosine", peak=2e-5, final=2e-6, warmup=50),
    )
    return Recipe(
        name=name,
        description=f"continued pre-training of {name}",
        tokenizer=tokenizer,
        model=found.model,
        sources={"corpus": Source(path="data/corpus", tokens=1_000_000_000)},
        phases=[phase],
        precision=Precision(compute="fp32" if dtype == torch.float32 else "bf16"),
    )
