"""Laws of fill-in-the-middle at document level, and of both levels in packs."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.data import fim_document
from megacode.data.fim import make_fim, rearrange_rows
from megacode.data.fim_document import rearrange_documents
from megacode.data.loader import StepReader
from megacode.data.mixture import OpenMixture, stream_key
from megacode.data.permute import uniform_bits
from megacode.data.source import Document, DocumentPart
from megacode.plan.plan import make_plan
from megacode.recipe import schema
from megacode.tokenizer.tokenizer import Tokenizer
from tests.data.conftest import mixture_of, recipe_of, write_shard
from tests.data.test_fim import CODE, TEXT, trained

LENGTH = 64

# ----------------------------------------------------------------------------- which sample shows what, without any text


def parts_of(documents: list[Document], start: int, stop: int) -> list[DocumentPart]:
    """The parts of documents that tokens [start, stop) touch."""
    found = []
    for document in documents:
        low, high = max(start, document.start), min(stop, document.start + document.tokens)
        if low < high:
            found.append(DocumentPart(document, low - document.start, high - low))
    return found


def assemble(
    documents: list[Document],
    growth: list[int],
    samples: list[list[DocumentPart]],
    length: int,
    packed: bool,
) -> list[list[tuple[int, int]]]:
    """What each sample shows, as (document, token of the rearranged one); a document grows by its `growth` tokens."""
    new = {
        document.start: [
            1000 * (number + 1) + token for token in range(max(document.tokens + more, 0))
        ]
        for number, (document, more) in enumerate(zip(documents, growth, strict=True))
    }

    def rows(_: Any, rows: Any, keys: Any, rates: Any, edges: Any) -> list[list[int] | None]:
        return [new[int(row[0])] for row in rows]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fim_document, "rearrange_rows", rows)
        out, lengths = rearrange_documents(
            type("Fim", (), {"pad": -1})(), samples, length,  # type: ignore[arg-type]
            keys=np.zeros(len(samples), np.uint64), rates=np.ones(len(samples)),
            packed=np.full(len(samples), packed),
            read=lambda sample, start, tokens: np.full(tokens, start),
        )  # fmt: skip
    assert all((row[count:] == -1).all() for row, count in zip(out, lengths.tolist(), strict=True))
    shown = [row[:count].tolist() for row, count in zip(out, lengths.tolist(), strict=True)]
    return [[(token // 1000 - 1, token % 1000) for token in row] for row in shown]


SIZES = st.lists(st.tuples(st.integers(1, 60), st.integers(-6, 9)), min_size=1, max_size=12)


def laid_out(sizes: list[tuple[int, int]]) -> list[Document]:
    ends = np.cumsum([size for size, _ in sizes]).tolist()
    return [
        Document(Path("p"), n, end - size, size)
        for n, ((size, _), end) in enumerate(zip(sizes, ends, strict=True))
    ]


@settings(max_examples=300, deadline=None)
@given(sizes=SIZES, sequence=st.integers(2, 20))
def test_windows_in_order_show_rearranged_documents_in_order_without_repeats(
    sizes: list[tuple[int, int]], sequence: int
) -> None:
    documents, growth = laid_out(sizes), [more for _, more in sizes]
    total = sum(size for size, _ in sizes)
    windows = (total - 1) // sequence
    samples = [
        parts_of(documents, w * sequence, w * sequence + sequence + 1) for w in range(windows)
    ]
    shown = assemble(documents, growth, samples, sequence + 1, packed=False)
    inputs = [one for row in shown for one in row[:-1]]  # of which each has a label
    assert inputs == sorted(set(inputs))
    assert all(row == sorted(row) for row in shown)
    # What is lost at windows' ends is at most what grew in them.
    for number, (row, parts) in enumerate(zip(shown, samples, strict=True)):
        ended = [part.document.document for part in parts[:-1] if part.ends]
        grown = sum(max(growth[n], 0) for n in ended)
        expected = {
            (part.document.document, token)
            for part in parts
            for token in range(part.first, part.first + part.tokens)
            if token < part.document.tokens + growth[part.document.document]
        }
        expected |= {
            (n, token) for n in ended for token in range(sizes[n][0], sizes[n][0] + growth[n])
        }
        assert set(row) <= expected and len(expected) - len(row) <= grown, number
    if not any(growth):
        plain = [(n, token) for n, (size, _) in enumerate(sizes) for token in range(size)]
        assert shown == [plain[w * sequence : w * sequence + sequence + 1] for w in range(windows)]


@settings(max_examples=200, deadline=None)
@given(sizes=SIZES, capacity=st.integers(3, 25))
def test_packs_show_rearranged_documents_in_order_without_repeats(
    sizes: list[tuple[int, int]], capacity: int
) -> None:
    documents, growth = laid_out(sizes), [more for _, more in sizes]
    pieces = [
        DocumentPart(document, first, min(capacity, document.tokens - first))
        for document in documents
        for first in range(0, document.tokens, capacity)
    ]
    shown = assemble(documents, growth, [[piece] for piece in pieces], capacity, packed=True)
    tokens = [one for row in shown for one in row]
    assert tokens == sorted(set(tokens))
    lost = sum(max(size + more, 0) for size, more in sizes) - len(tokens)
    assert 0 <= lost <= sum(max(more, 0) for more in growth)


# ---------------------------------------------------------------------------------------------------- in a mixture


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained(tmp_path_factory.mktemp("t"), "ours")


@pytest.fixture(scope="module")
def make(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """keys of the recipe's data section -> OpenMixture over documents from a few to some hundred tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [CODE[:40], TEXT, CODE, TEXT[:150], "x = 1\n", CODE * 3, TEXT[30:70], CODE[20:90]] * 3
    ids = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eod_id] for text in texts]
    write_shard(folder / "code", ids, tokenizer.vocab_size)

    def build(rate: float = 1.0, **data: Any) -> OpenMixture:
        phase = {
            "steps": 60,
            "sequence_length": LENGTH,
            "mixture": {"sources": {"code": 1}},
            "fim_rate": rate,
        }
        return mixture_of(recipe_of({"code": {"path": str(folder / "code")}}, [phase], data=data))

    return build


def rearranged(
    mixture: OpenMixture, tokenizer: Tokenizer, document: Document, epoch: int, rate: float = 1.0
) -> list[int]:
    """The whole document as the module's docstring says it is rearranged."""
    stream = mixture.plan.phases[0].streams[0]
    key = uniform_bits(
        uniform_bits(stream_key(mixture.plan.recipe.seed, "fim", stream), epoch), document.start
    )
    row = (
        mixture.sources["code"]
        .read(np.array([document.start]), document.tokens)[0]
        .astype(np.int64)
    )
    (ids,) = rearrange_rows(
        make_fim(schema.FimSection(), tokenizer), [row], key, np.array([rate]), ["none"]
    )
    return row.tolist() if ids is None else ids


def samples_of(mixture: OpenMixture, tokenizer: Tokenizer) -> list[tuple[int, int, list[int]]]:
    """(epoch, start, real tokens) of all samples."""
    reader, out = StepReader(mixture, tokenizer=tokenizer), []
    for step in range(mixture.plan.total_steps):
        batch = reader.read(step)
        for index, part in enumerate(batch.micro_batches):
            ids = [*part.tokens[0].tolist(), int(part.labels[0, -1])]
            real = int(part.loss_mask[0].sum()) + 1
            out.append(
                (int(batch.samples.epoch[index]), int(batch.samples.start[index]), ids[:real])
            )
    return out


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_samples_show_slices_of_the_documents_rearranged_whole(
    make: Any, tokenizer: Tokenizer, packing: str
) -> None:
    mixture = make(fim={"level": "document"}, packing=packing)
    stream, several = mixture.plan.phases[0].streams[0], 0
    for epoch, start, ids in samples_of(mixture, tokenizer)[:200]:
        parts = (
            mixture.sources["code"].parts(start, LENGTH + 1)
            if packing == "concatenate"
            else [
                part
                for first, tokens in mixture.sources["code"].packs[LENGTH].pieces(start // LENGTH)
                for part in mixture.sources["code"].parts(first, tokens)
            ]
        )
        whole = [rearranged(mixture, tokenizer, part.document, epoch) for part in parts]
        expected: list[int] = []
        for place, (part, new) in enumerate(zip(parts, whole, strict=True)):
            grows = part.ends and (packing == "best_fit" or place < len(parts) - 1)
            expected += new[part.first :] if grows else new[part.first : part.first + part.tokens]
        assert ids == expected[: LENGTH + 1]
        several += any(part.tokens < part.document.tokens for part in parts)
    assert several > 20 and stream.fim_level == "document"


def test_a_document_inside_a_window_keeps_its_characters(make: Any, tokenizer: Tokenizer) -> None:
    mixture = make(fim={"level": "document", "spm_rate": 0.5})
    reader, seen = StepReader(mixture, tokenizer=tokenizer), Counter()
    marks = [tokenizer.token_id(f"<|fim_{name}|>") for name in ("prefix", "suffix", "middle")]
    for step, place in itertools.product(range(20), range(8)):
        origin = mixture.describe(step, [place])[0]
        ids = reader.sample(step, place).tokens[0].tolist()
        ends = [-1, *(i for i, token in enumerate(ids) if token == tokenizer.eod_id)]
        for part, low, high in zip(origin.parts[:-1], ends, ends[1:], strict=False):
            if part.tokens < part.document.tokens:
                continue
            original = (
                mixture.sources["code"]
                .read(np.array([part.document.start]), part.tokens)[0]
                .tolist()
            )
            new = ids[low + 1 : high]
            assert new[0] == original[0] == tokenizer.bos_id and sorted(
                t for t in new if t in marks
            ) == sorted(marks)
            assert Counter(tokenizer.decode(new)) == Counter(tokenizer.decode(original))
            seen[new[1], new[2]] += 1
    assert sum(seen.values()) > 30 and len(seen) > 1


@pytest.mark.parametrize("level", ["context", "document"])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_it_replays_in_any_layout_and_differs_by_epoch(
    make: Any, tokenizer: Tokenizer, level: str, packing: str
) -> None:
    mixture = make(rate=0.7, fim={"level": level}, packing=packing)
    for step in (31, 2):
        whole = StepReader(mixture, tokenizer=tokenizer).read(step).digest
        for world, size in ((1, 8), (2, 2), (4, 1)):
            parts = [
                StepReader(
                    mixture, rank=rank, world=world, micro_batch_size=size, tokenizer=tokenizer
                ).read(step)
                for rank in range(world)
            ]
            assert sum(part.digest for part in parts) % 2**64 == whole
    forms: dict[int, set[tuple[int, ...]]] = {}
    for _, start, ids in samples_of(mixture, tokenizer):
        forms.setdefault(start, set()).add(tuple(ids))
    assert max(map(len, forms.values())) > 3


def test_packs_are_rearranged_in_their_own_room(make: Any, tokenizer: Tokenizer) -> None:
    """Context level: what a pack's documents grow by takes its padding first; then the end is cut, as in a window."""
    plain, packed = (
        samples_of(make(rate=rate, packing="best_fit"), tokenizer) for rate in (0.0, 1.0)
    )
    marks = {tokenizer.token_id(f"<|fim_{name}|>") for name in ("prefix", "suffix", "middle")}
    grown = 0
    for (_, start, before), (_, other, after) in zip(plain, packed, strict=True):
        assert start == other and marks & set(after)
        if len(after) <= LENGTH and tokenizer.eod_id in after:
            grown += len(after) > len(before)
            assert Counter(tokenizer.decode(before)) == Counter(tokenizer.decode(after))
    assert grown > 0


def test_giant_documents_are_left_as_they_are(
    make: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fim_document, "MAX_WINDOWS", 1)
    mixture = make(fim={"level": "document"})
    marks = {tokenizer.token_id(f"<|fim_{name}|>") for name in ("prefix", "suffix", "middle")}
    left = 0
    for _, start, ids in samples_of(mixture, tokenizer):
        parts = mixture.sources["code"].parts(start, LENGTH + 1)
        if all(part.document.tokens > LENGTH for part in parts):
            assert ids == mixture.sources["code"].read(np.array([start]), LENGTH + 1)[0].tolist()
            left += 1
        elif any(
            part.document.tokens <= LENGTH and part.first == 0 and part.tokens > 1 for part in parts
        ):
            assert marks & set(ids) or parts[-1].tokens < 4
    assert left > 20


def test_the_level_is_chosen_by_phase_domain_and_source() -> None:
    def levels(**phase: Any) -> list[str]:
        sources = {name: {"tokens": 10_000, "domain": "code"} for name in ("a", "b")}
        given = {"steps": 1, "fim_rate": 0.5, "mixture": {"domains": {"code": 1}}, **phase}
        plan = make_plan(
            recipe_of(sources, [given], tokenizer={"path": "x"}), {"a": 10_000, "b": 10_000}
        )
        return [stream.fim_level for stream in plan.phases[0].streams]

    assert levels() == ["context", "context"]
    assert levels(fim_level="document") == ["document", "document"]
    domain = {
        "ratio": 1,
        "fim_level": "document",
        "sources": {"a": {"fim_level": "context"}, "b": {}},
    }
    assert levels(mixture={"domains": {"code": domain}}) == ["context", "document"]
    assert levels(mixture={"sources": {"a": {"weight": 1, "fim_level": "document"}, "b": 1}}) == [
        "document",
        "context",
    ]
