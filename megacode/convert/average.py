"""The mean of a run's checkpoints -> a checkpoint of weights alone, tensor by tensor.

Sums are float64; the mean is stored in the type of the newest checkpoint's weights. The checkpoints
may have been saved in different layouts, with different padding. Other verbs take the result like
any checkpoint, and `initialize_from` starts from it. There is no optimizer state in it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacode.convert.checkpoint_writer import CheckpointWriter
from megacode.convert.export import ExportSource
from megacode.convert.layout import LAYER, padded, unpadded
from megacode.convert.new_folder import new_folder
from megacode.errors import UserError
from megacode.megatron.checkpoint_index import EMA
from megacode.plan.past import changed_function
from megacode.recipe.load import dump_recipe
from megacode.run.checkpoints import AVERAGES, INFO, checkpoint_name, complete_checkpoints

_NUMBERED = re.compile(rf"{re.escape(LAYER)}(\d+)\.")


@dataclass(frozen=True)
class Average:
    """Checkpoints of one run whose mean can be taken.

    Attributes:
        sources: oldest first. Recipe, types and names of tensors are the last one's.
        ema: take the moving average of the weights (`optimizer.ema`) that each has.
    """

    run: Path
    sources: tuple[ExportSource, ...]
    ema: bool

    @classmethod
    def open(cls, run: Path, last: int | None, steps: list[int] | None, ema: bool) -> Average:
        """The last N checkpoints, or those of `steps`.

        Raises:
            UserError: one is not there or not readable, has no EMA where it is asked for, or its
                model computes something else than the last one's.
        """
        there = dict(complete_checkpoints(run / "checkpoints"))
        have = ", ".join(map(str, there)) or "none"
        if last and len(there) < last:
            raise UserError(
                f"{run}: --last {last}: the run has {len(there)} checkpoints (steps: {have}); ask "
                "for fewer, or keep more with `checkpoints.keep_every`"
            )
        wanted = sorted(set(steps)) if steps else [*there][-(last or 1) :]
        if missing := [step for step in wanted if step not in there]:
            raise UserError(
                f"{run}: --steps: has no checkpoint at step {missing[0]}; there are: {have}"
            )
        sources = tuple(ExportSource.open(there[step]) for step in wanted)
        newest = sources[-1]
        for source in sources:
            if ema and not source.info.get("ema"):
                raise UserError(
                    f"{source.checkpoint}: has no EMA of its weights; train with `optimizer.ema`, "
                    "or take --weights raw"
                )
            if source.vocab_size != newest.vocab_size:
                raise UserError(
                    f"{source.checkpoint}: has a vocabulary of {source.vocab_size:,}, and "
                    f"{newest.checkpoint.name} of {newest.vocab_size:,}; average checkpoints of "
                    "one model with --steps"
                )
            if changes := changed_function(source.recipe, newest.recipe):
                raise UserError(
                    f"{source.checkpoint}: its model is another than that of "
                    f"{newest.checkpoint.name} ({changes[0]}); average checkpoints of one "
                    "model with --steps"
                )
        return cls(run, sources, ema)

    @property
    def steps(self) -> list[int]:
        return [int(source.info["step"]) for source in self.sources]

    @property
    def folder(self) -> Path:
        """Where it goes unless told otherwise: `RUN/averages/step_00000300-ema-mean-of-4`."""
        count = len(self.sources)
        endings = "-ema" * self.ema + f"-mean-of-{count}" * (count > 1 or not self.ema)
        return self.run / AVERAGES / f"{checkpoint_name(self.steps[-1])}{endings}"

    @property
    def nbytes(self) -> int:
        """What `write` reports as done in the end: the weights of one checkpoint."""
        stored = self.sources[-1].reader.metadata.state_dict_metadata
        return sum(
            math.prod(stored[name].size) * stored[name].properties.dtype.itemsize
            for name in {name for name, *_ in self._weights()}
        )

    def _weights(self) -> Iterator[tuple[str, str, int | None]]:
        """(stored name, name without the layer's number, layer) of every weight."""
        stored = self.sources[-1].reader.metadata.state_dict_metadata
        for name, about in stored.items():
            if name.startswith("optimizer.") or not hasattr(about, "chunks"):
                continue
            if match := _NUMBERED.match(name):
                yield name, LAYER + name[match.end() :], int(match[1])
            elif name.startswith(LAYER):
                yield from ((name, name, layer) for layer in range(about.size[0]))
            else:
                yield name, name, None

    def write(self, out: Path, on_bytes: Callable[[int], None]) -> list[str]:
        """Write the checkpoint's folder, whole or not at all.

        Returns:
            what the user should know, in sentences.

        Raises:
            UserError: a tensor is damaged or has another shape, or `out` cannot be written.
        """
        newest, unequal = self.sources[-1], []
        with new_folder(out) as temporary:
            writer = CheckpointWriter(temporary, newest.model.layers)
            for name, key, layer in self._weights():
                tensor, equal = self._mean(key, layer)
                if not equal:
                    unequal.append(name)
                writer.add(name, layer if name == key else None, tensor)
                on_bytes(tensor.nbytes)
            writer.finish()
            (temporary / "recipe.yaml").write_text(dump_recipe(newest.recipe))
            (temporary / INFO).write_text(json.dumps(self._info(), indent=1))
        notes = []
        if unequal:
            notes.append(
                f"{len(unequal)} tensors of whole numbers differ between the checkpoints and are "
                f"those of step {self.steps[-1]:,}: {', '.join(unequal[:3])}"
            )
        if newest.recipe.precision.compute == "fp8":
            stored = newest.reader.metadata.state_dict_metadata
            scales = sum("_extra_state/" in name for name in stored)
            notes.append(
                f"FP8 scales ({scales:,} entries) are left out; a run that starts here has new ones"
            )
        return notes

    def _mean(self, key: str, layer: int | None) -> tuple[Tensor, bool]:
        """The tensor to store, padded; and False where whole numbers differ: the last are taken."""
        newest = self.sources[-1]
        model, dtype = newest.model, newest.reader.dtype(key, layer)
        total, equal = None, True
        for source in self.sources:
            prefix = EMA if self.ema and dtype.is_floating_point else ""
            stored = source.reader.tensor(prefix + key, layer)
            part = unpadded(source.model, newest.vocab_size, key, stored)
            if total is not None and part.shape != total.shape:
                raise UserError(
                    f"{source.checkpoint}: {key} has shape {tuple(part.shape)}, and "
                    f"{tuple(total.shape)} in {self.sources[0].checkpoint.name}; average "
                    "checkpoints of one model with --steps"
                )
            if not dtype.is_floating_point:
                equal = equal and (total is None or torch.equal(part, total))
                total = part
            else:
                total = part.double() if total is None else total.add_(part)
        assert total is not None
        if dtype.is_floating_point:
            total = total.div_(len(self.sources)).to(dtype)
        return padded(model, key, total), equal

    def _info(self) -> dict[str, Any]:
        """The last checkpoint's megacode.json, without what only a run goes on from."""
        kept = ("step", "recipe", "phase", "tokens", "vocab_size", "tokenizer", "imported")
        info = {key: value for key, value in self.sources[-1].info.items() if key in kept}
        weights = "ema" if self.ema else "raw"
        made_of = {"run": str(self.run.resolve()), "steps": self.steps, "weights": weights}
        return {**info, "vocab_size": self.sources[-1].vocab_size, "average": made_of}
