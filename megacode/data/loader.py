"""The batches of one data-parallel rank, step by step.

In a step of B sequences on `world` data-parallel ranks with micro-batches of m, rank r's
micro-batch i holds the batch's positions [i m world + r m, + m). Each rank works out and reads its
own positions; nothing is sent between ranks. Their union is the same for every `world` and m.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megacode.data.batch import Batch, Marks, make_batch
from megacode.data.mixture import OpenMixture, StepSamples
from megacode.data.prefetch import Prefetch
from megacode.data.sample_reader import SampleReader, check_ids
from megacode.data.source import TokenSource
from megacode.errors import UserError
from megacode.recipe.schema import LossOn
from megacode.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One rank's share of a step: its micro-batches, and their samples in the same order."""

    step: int
    micro_batches: tuple[Batch, ...]
    samples: StepSamples

    @property
    def digest(self) -> int:
        """Sum of the micro-batches' digests modulo 2^64; the sum over ranks is the step's."""
        return sum(batch.digest for batch in self.micro_batches) % 2**64


class StepReader:
    """Makes any step's `StepBatch`: a pure function of (plan, step, rank, world, size).

    Args:
        rank, world: of the data-parallel group.
        micro_batch_size: default: the recipe's `parallel.micro_batch_size`.
        tokenizer: needed for fill-in-the-middle and document boundaries; UserError without one.
    """

    def __init__(
        self,
        mixture: OpenMixture,
        *,
        rank: int = 0,
        world: int = 1,
        micro_batch_size: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        plan = mixture.plan
        self.mixture, self.rank, self.world = mixture, rank, world
        self.micro_batch_size = micro_batch_size or plan.recipe.parallel.micro_batch_size
        self._data = plan.recipe.data
        self._samples = SampleReader(mixture, tokenizer)
        self._eod: int | None = None
        if self._data.mask_eod_loss or any(phase.reset_at_eod for phase in plan.phases):
            if tokenizer is None:
                raise UserError("tokenizer: document boundaries need one; name it in the recipe")
            self._eod = tokenizer.eod_id

    def read(self, step: int) -> StepBatch:
        """UserError if the batch does not divide among ranks, or an id is above the vocabulary.

        Any other failure becomes a RuntimeError with the step and the rank, its cause attached.
        """
        try:
            return self._read(step)
        except UserError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"loading step {step} on data-parallel rank {self.rank} failed: {error!r}"
            ) from error

    def _read(self, step: int) -> StepBatch:
        size, phase = self.micro_batch_size, self.mixture.plan.phase_at(step)
        total = phase.batch_size(step)
        if total % (size * self.world):
            raise UserError(
                f"phases.{phase.name}.batch_size: {total} sequences in step {step} do not divide "
                f"into micro-batches of {size} on {self.world} data-parallel ranks; make it a "
                f"multiple of {size * self.world}"
            )
        places = np.arange(total).reshape(-1, self.world, size)[:, self.rank].reshape(-1)
        samples = self.mixture.step(step, places)
        parts = [samples.take(slice(first, first + size)) for first in range(0, len(places), size)]
        return StepBatch(step, tuple(map(self._batch, parts)), samples)

    def sample(self, step: int, place: int) -> Batch:
        """The sample at one place of a step's batch, as training sees it. IndexError outside it."""
        return self._batch(self.mixture.step(step, [place]))

    def _batch(self, samples: StepSamples) -> Batch:
        read = self._samples.read(samples)
        return make_batch(
            read.windows,
            samples.stream,
            samples.positions,
            lengths=read.lengths,
            marks=read.marks,
            eod_id=self._eod,
            reset_at_eod=samples.phase.reset_at_eod,
            mask_eod_loss=self._data.mask_eod_loss,
        )


def batches(
    reader: StepReader,
    first_step: int = 0,
    prefetch: int | None = None,
    end_step: int | None = None,
) -> Prefetch[StepBatch]:
    """A rank's batches from `first_step` to `end_step` (default: the run's end). Close it (or use
    `with`) to end early.

    `prefetch`: steps prepared ahead on a thread; default: the recipe's `data.prefetch`.
    """
    plan = reader.mixture.plan
    depth = plan.recipe.data.prefetch if prefetch is None else prefetch
    steps = range(first_step, plan.total_steps if end_step is None else end_step)
    return Prefetch(map(reader.read, steps), depth)


def validation_batches(
    source: TokenSource,
    sequence_length: int,
    samples: int,
    *,
    rank: int = 0,
    world: int = 1,
    micro_batch_size: int = 1,
    eod_id: int | None = None,
    reset_at_eod: bool = False,
    mask_eod_loss: bool = False,
    vocab_size: int | None = None,
    loss_on: LossOn = "all",
) -> Iterator[Batch]:
    """The first `samples` windows of a held-out source, in order: windows [i S, i S + S + 1); or
    its first packs, where it has packs of S tokens.

    Every rank gets equally many micro-batches: what is missing is filled with fully masked samples.
    A shorter last window is padded and masked. `stream` is 0 throughout.
    """
    packs = source.packs.get(sequence_length)
    available = len(packs) if packs else -(-(source.tokens - 1) // sequence_length)
    if available < 1:
        raise UserError(f"sources.{source.name}.validation: has one token, which predicts nothing")
    count, share = min(samples, available), world * micro_batch_size
    for first in range(0, count, share):
        places = np.arange(first + rank * micro_batch_size, first + (rank + 1) * micro_batch_size)
        pieces: list[list[tuple[int, int]]] = []
        for place in places.tolist():
            start = place * sequence_length
            if place >= count:
                pieces.append([])
            elif packs:
                pieces.append(packs.pieces(place))
            else:
                pieces.append([(start, min(sequence_length + 1, source.tokens - start))])
        windows, lengths = source.read_pieces(pieces, sequence_length + 1, 0)
        check_ids(source, windows, vocab_size)
        marks = None
        if source.marks is not None:
            marks = Marks.none(*windows.shape)
            own = source.marks.read_pieces(pieces, sequence_length + 1, 0)[0]
            marks.set(np.arange(len(own)), own, loss_on)
        yield make_batch(
            windows,
            np.zeros(micro_batch_size, dtype=np.int32),
            places,
            lengths=lengths,
            marks=marks,
            eod_id=eod_id,
            reset_at_eod=reset_at_eod,
            mask_eod_loss=mask_eod_loss,
        )
