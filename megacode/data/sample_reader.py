"""Samples -> their tokens: windows and packs read from the sources, fill-in-the-middle applied;
and which tokens of conversations are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.batch import Marks
from megacode.data.fim import Fim, make_fim, rearrange
from megacode.data.fim_document import rearrange_documents
from megacode.data.mixture import (
    OpenMixture,
    StepSamples,
    sample_parts,
    sample_pieces,
    stream_key,
)
from megacode.data.permute import uniform_bits
from megacode.data.source import TokenSource
from megacode.errors import UserError
from megacode.tokenizer.tokenizer import Tokenizer

Tokens = tuple[NDArray[Any], NDArray[np.int64]]
"""Tokens [n, S + 1], and how many of each sample's are real, int64 [n]; the rest is padding."""


@dataclass(frozen=True, eq=False)
class SampleTokens:
    """Tokens of samples.

    Attributes:
        windows: [n, S + 1], any integer type.
        lengths: int64 [n], how many of each are real; the rest is padding.
        marks: None if no sample is of conversations.
    """

    windows: NDArray[Any]
    lengths: NDArray[np.int64]
    marks: Marks | None = None


class SampleReader:
    """Reads any samples of a mixture.

    Raises:
        UserError: fill-in-the-middle has no tokenizer, or one without its control tokens.
    """

    def __init__(self, mixture: OpenMixture, tokenizer: Tokenizer | None) -> None:
        recipe, phases = mixture.plan.recipe, mixture.plan.phases
        self.mixture = mixture
        self._vocab_size = tokenizer.vocab_size if tokenizer else recipe.model.vocab_size
        self._pad = _pad_id(tokenizer)
        self._fim: Fim | None = None
        if any(stream.fim_rate > 0 for phase in phases for stream in phase.streams):
            if tokenizer is None:
                raise UserError(
                    "tokenizer: fill-in-the-middle and its tokens need one; name it in the recipe"
                )
            self._fim = make_fim(recipe.data.fim, tokenizer)
        keys = [
            [stream_key(recipe.resolved_data_seed, "fim", s) for s in phase.streams]
            for phase in phases
        ]
        self._keys = [np.array(of_phase, dtype=np.uint64) for of_phase in keys]

    def read(self, samples: StepSamples) -> SampleTokens:
        """UserError if a source holds ids outside the vocabulary, or cannot be read."""
        stored = self._stored(samples)
        if self._fim is None:
            return stored
        rates = np.array([stream.fim_rate for stream in samples.phase.streams])[samples.stream]
        if not rates.any():
            return stored
        windows, lengths = self._rearranged(
            self._fim, samples, rates, stored.windows.astype(np.int64), stored.lengths
        )
        return SampleTokens(windows, lengths, stored.marks)

    def _stored(self, samples: StepSamples) -> SampleTokens:
        """Tokens as they are on disk, in a type that holds those of all sources."""
        size, marks = samples.phase.sequence_length + 1, None
        lengths = np.full(len(samples), size, dtype=np.int64)
        read = []
        for index in np.unique(samples.stream).tolist():
            stream, rows = samples.phase.streams[index], np.flatnonzero(samples.stream == index)
            source, starts = self.mixture.sources[stream.source], samples.start[rows]
            pieces = [sample_pieces(source, stream, start) for start in starts.tolist()]
            tokens, lengths[rows] = source.read_pieces(pieces, size, self._pad)
            check_ids(source, tokens, self._vocab_size)
            read.append((rows, tokens))
            if source.marks is not None:
                marks = marks or Marks.none(len(samples), size)
                own = source.marks.read_pieces(pieces, size, 0)[0]
                marks.set(rows, own, stream.loss_on)
        if len(read) == 1:
            return SampleTokens(tokens, lengths, marks)
        windows = np.empty((len(samples), size), np.result_type(*(part for _, part in read)))
        for rows, tokens in read:
            windows[rows] = tokens
        return SampleTokens(windows, lengths, marks)

    def _rearranged(
        self,
        fim: Fim,
        samples: StepSamples,
        rates: NDArray[np.float64],
        windows: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> Tokens:
        """Fill-in-the-middle on samples of context level, then on those of document level."""
        streams = [samples.phase.streams[index] for index in samples.stream.tolist()]
        packed = np.array([stream.packing != "concatenate" for stream in streams])
        by_document = np.array([stream.fim_level == "document" for stream in streams]) & (rates > 0)
        keys = uniform_bits(self._keys[samples.phase.index][samples.stream], samples.epoch)
        windows, lengths = rearrange(
            fim,
            windows,
            uniform_bits(keys, samples.start),
            np.where(by_document, 0.0, rates),
            lengths,
            packed,
        )
        rows = np.flatnonzero(by_document)
        if not len(rows):
            return windows, lengths
        sources = [self.mixture.sources[streams[row].source] for row in rows]
        parts = [
            sample_parts(source, streams[row], int(samples.start[row]))
            for source, row in zip(sources, rows, strict=True)
        ]

        def read(number: int, start: int, tokens: int) -> NDArray[np.int64]:
            found = sources[number].read(np.array([start]), tokens)[0]
            check_ids(sources[number], found, self._vocab_size)
            return found.astype(np.int64)

        windows[rows], lengths[rows] = rearrange_documents(
            fim,
            parts,
            windows.shape[1],
            keys=keys[rows],
            rates=rates[rows],
            packed=packed[rows],
            read=read,
        )
        return windows, lengths


def _pad_id(tokenizer: Tokenizer | None) -> int:
    """What fills packs, without loss: the tokenizer's padding, else an id that is not EOD."""
    if tokenizer is None:
        return 0
    eod = tokenizer.base.eod_id
    if tokenizer.pad_id is not None and tokenizer.pad_id != eod:
        return tokenizer.pad_id
    return 1 if eod == 0 else 0


def check_ids(source: TokenSource, windows: NDArray[Any], vocab_size: int | None) -> None:
    """UserError for an id outside the vocabulary, which would crash an embedding without a name."""
    if vocab_size is None or not windows.size:
        return
    highest, lowest = int(windows.max()), int(windows.min())
    if highest >= vocab_size or lowest < 0:
        found = highest if highest >= vocab_size else lowest
        raise UserError(
            f"sources.{source.name}: holds token {found}, outside the vocabulary of "
            f"{vocab_size:,}; made with another tokenizer: tokenize it again with this recipe's"
        )
