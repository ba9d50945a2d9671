"""Samples -> their tokens: windows and packs read from the sources, fill-in-the-middle applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.fim import Fim, make_fim, rearrange
from megacode.data.fim_document import rearrange_documents
from megacode.data.mixture import OpenMixture, StepSamples, sample_parts, stream_key
from megacode.data.permute import uniform_bits
from megacode.data.source import Document, TokenSource
from megacode.errors import UserError

Tokens = tuple[NDArray[Any], NDArray[np.int64] | None]
"""Tokens [n, S + 1], and how many of each sample's are real [n] (None: all); the rest is padding."""


@dataclass(frozen=True, eq=False)
class SampleReader:
    """Reads any samples of a mixture.

    Attributes:
        pad: fills packs that no fill-in-the-middle touched.
        fim: None where no stream of any phase uses it.
        keys, rates: of fill-in-the-middle, for each phase uint64 [streams] and float64 [streams].
    """

    mixture: OpenMixture
    vocab_size: int | None
    pad: int
    fim: Fim | None
    keys: tuple[NDArray[np.uint64], ...]
    rates: tuple[NDArray[np.float64], ...]

    @classmethod
    def open(cls, mixture: OpenMixture, tokenizer: Any) -> SampleReader:
        """UserError if fill-in-the-middle is asked for and there is no tokenizer, or one without its tokens."""
        recipe, phases = mixture.plan.recipe, mixture.plan.phases
        settings = None
        if any(stream.fim_rate > 0 for phase in phases for stream in phase.streams):
            if tokenizer is None:
                raise UserError(
                    "tokenizer: the control tokens of fill-in-the-middle need one; name it in the recipe"
                )
            settings = make_fim(recipe.data.fim, tokenizer)
        return cls(
            mixture,
            tokenizer.vocab_size if tokenizer is not None else recipe.model.vocab_size,
            _pad_id(tokenizer),
            settings,
            tuple(
                np.array(
                    [stream_key(recipe.seed, "fim", stream) for stream in phase.streams],
                    dtype=np.uint64,
                )
                for phase in phases
            ),
            tuple(np.array([stream.fim_rate for stream in phase.streams]) for phase in phases),
        )

    def read(self, samples: StepSamples) -> Tokens:
        """UserError if a source holds ids outside the vocabulary, or cannot be read."""
        windows, lengths = self._stored(samples)
        if self.fim is not None and (self.rates[samples.phase.index][samples.stream] > 0).any():
            return self._rearranged(self.fim, samples, windows.astype(np.int64), lengths)
        return windows, lengths

    def _stored(self, samples: StepSamples) -> Tokens:
        """As they are on disk."""
        length = samples.phase.sequence_length + 1
        streams = np.unique(samples.stream).tolist()
        read = {}
        lengths = None
        for index in streams:
            stream, rows = samples.phase.streams[index], samples.stream == index
            source = self.mixture.sources[stream.source]
            if stream.packing == "best_fit":
                read[index], real = self._packs(
                    source, samples.start[rows] // stream.sequence_length, length
                )
                lengths = (
                    np.full(len(samples), length, dtype=np.int64) if lengths is None else lengths
                )
                lengths[rows] = real
            else:
                read[index] = source.read(samples.start[rows], length)
            check_ids(source, read[index], self.vocab_size)
        if len(streams) == 1:
            return read[streams[0]], lengths
        windows = np.empty((len(samples), length), dtype=np.result_type(*read.values()))
        for index, rows in read.items():
            windows[samples.stream == index] = rows
        return windows, lengths

    def _packs(
        self, source: TokenSource, packs: NDArray[np.int64], length: int
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Tokens of packs, padded to `length` [n, length], and how many are real [n]."""
        out = np.full((len(packs), length), self.pad, dtype=source.dtype)
        real = [
            source.read_pack(pack, length - 1, row)
            for pack, row in zip(packs.tolist(), out, strict=True)
        ]
        return out, np.array(real, dtype=np.int64)

    def _rearranged(
        self,
        settings: Fim,
        samples: StepSamples,
        windows: NDArray[np.int64],
        lengths: NDArray[np.int64] | None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        streams = samples.phase.streams
        rates = self.rates[samples.phase.index][samples.stream]
        keys = uniform_bits(self.keys[samples.phase.index][samples.stream], samples.epoch)
        packed = np.array([streams[index].packing == "best_fit" for index in samples.stream])
        whole = np.array([streams[index].fim_level == "document" for index in samples.stream]) & (
            rates > 0
        )
        windows, lengths = rearrange(
            settings,
            windows,
            uniform_bits(keys, samples.start),
            np.where(whole, 0.0, rates),
            lengths,
            packed,
        )
        rows = np.flatnonzero(whole)
        if not len(rows):
            return windows, lengths
        chosen = [streams[index] for index in samples.stream[rows]]
        sources = [self.mixture.sources[stream.source] for stream in chosen]

        def read(number: int, document: Document, first: int, tokens: int) -> NDArray[np.int64]:
            found = sources[number].read(np.array([document.start + first]), tokens)[0]
            check_ids(sources[number], found, self.vocab_size)
            return found.astype(np.int64)

        parts = [
            sample_parts(source, stream, start)
            for source, stream, start in zip(
                sources, chosen, samples.start[rows].tolist(), strict=True
            )
        ]
        windows[rows], lengths[rows] = rearrange_documents(
            settings,
            parts,
            windows.shape[1],
            keys=keys[rows],
            rates=rates[rows],
            packed=packed[rows],
            read=read,
        )
        return windows, lengths


def _pad_id(tokenizer: Any) -> int:
    """What fills packs: the tokenizer's padding, else an id that ends no document. It is never seen by a loss."""
    if tokenizer is None:
        return 0
    eod = tokenizer.base.eod_id
    if tokenizer.pad_id is not None and tokenizer.pad_id != eod:
        return int(tokenizer.pad_id)
    return 1 if eod == 0 else 0


def check_ids(source: TokenSource, windows: NDArray[Any], vocab_size: int | None) -> None:
    """UserError for an id outside the vocabulary, which would otherwise crash in the embedding, on some rank, unnamed."""
    if vocab_size is None or not windows.size:
        return
    highest, lowest = int(windows.max()), int(windows.min())
    if highest >= vocab_size or lowest < 0:
        raise UserError(
            f"sources.{source.name}: holds token {highest if highest >= vocab_size else lowest}, outside the vocabulary "
            f"of {vocab_size:,}; it was made with another tokenizer: tokenize it again with this recipe's"
        )
