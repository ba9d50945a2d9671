"""Laws of the data order with `packing: best_fit`: those of windows, and whole documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megacode.data.loader import StepReader
from megacode.data.mixture import OpenMixture
from megacode.data.planning import plan_with_data
from megacode.errors import UserError
from megacode.plan.fingerprint import differences, fingerprint
from megacode.plan.plan import make_plan
from megacode.recipe.checks import check_recipe
from tests.data.conftest import mixture_of, recipe_of, write_shard

Make = Callable[..., OpenMixture]
TOKENS = 3000


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """phases, keys -> OpenMixture over `p` (3,000 counted tokens in documents of 0 to 39, two shards) and `c` (concatenated)."""
    folder = tmp_path_factory.mktemp("packed")
    random, ids, documents = np.random.default_rng(0), iter(range(TOKENS)), []
    while sum(map(len, documents)) < TOKENS:
        documents.append(
            [
                next(ids)
                for _ in range(min(int(random.integers(0, 40)), TOKENS - sum(map(len, documents))))
            ]
        )
    write_shard(folder / "p0", documents[:70], 200_000)
    write_shard(folder / "p1", documents[70:], 200_000)
    write_shard(folder / "c", [list(range(100_000, 101_000))], 200_000)
    sources = {
        "p": {"path": str(folder / "p?"), "packing": "best_fit"},
        "c": {"path": str(folder / "c")},
        "gone": {"path": str(folder / "gone"), "packing": "best_fit", "tokens": 1000},
    }

    def build(phases: list[dict[str, Any]], **keys: Any) -> OpenMixture:
        return mixture_of(recipe_of(sources, phases, **keys))

    return build


ALONE = {"mixture": {"sources": {"p": 1}}}


def of_epoch(mixture: OpenMixture, steps: range, epoch: int) -> list[list[int]]:
    """What `shown` gives of one epoch (which may end within a step)."""
    epochs = [number for step in steps for number in mixture.step(step).epoch.tolist()]
    return [
        sample
        for number, sample in zip(epochs, shown(mixture, steps), strict=True)
        if number == epoch
    ]


def shown(mixture: OpenMixture, steps: range) -> list[list[int]]:
    """The real tokens of every sample, in order."""
    out = []
    for step in steps:
        for batch in StepReader(mixture, micro_batch_size=4).read(step).micro_batches:
            for tokens, labels, mask in zip(
                batch.tokens, batch.labels, batch.loss_mask, strict=True
            ):
                real = int(mask.sum()) + 1
                assert (mask[: real - 1] == 1).all() and not (labels[real - 1 :] != 0).any()
                out.append([*tokens.tolist(), int(labels[-1])][:real])
    return out


def test_an_epoch_shows_every_token_once_and_documents_whole(make: Make) -> None:
    mixture = make([{"steps": 40, **ALONE}])
    stream = mixture.plan.phases[0].streams[0]
    samples = of_epoch(mixture, range(40), 0)
    assert Counter(token for sample in samples for token in sample) == Counter(range(TOKENS))
    where = {token: number for number, sample in enumerate(samples) for token in sample}
    source = mixture.sources["p"]
    position = 0
    while position < TOKENS:
        document = source.document_at(position)
        rows = {where[token] for token in range(document.start, document.start + document.tokens)}
        assert len(rows) == 1 if document.tokens <= 17 else len(rows) <= document.tokens // 17 + 1
        position = document.start + document.tokens
    assert stream.epochs == 40 * 8 / stream.windows


def test_two_epochs_are_two_orders_of_the_same_packs(make: Make) -> None:
    mixture = make([{"steps": 60, **ALONE}])
    first, second = of_epoch(mixture, range(60), 0), of_epoch(mixture, range(60), 1)
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize(("world", "size"), [(1, 8), (2, 2), (8, 1)])
def test_any_layout_reads_the_same(make: Make, world: int, size: int) -> None:
    mixture = make([{"steps": 9, "mixture": {"sources": {"p": 0.6, "c": 0.4}}}])
    for step in (8, 0):
        parts = [
            StepReader(mixture, rank=r, world=world, micro_batch_size=size).read(step)
            for r in range(world)
        ]
        assert sum(part.digest for part in parts) % 2**64 == StepReader(mixture).read(step).digest


def test_a_cursor_goes_on_and_subsets_have_their_own(make: Make) -> None:
    one, two = make([{"steps": 20, **ALONE}]), make([{"steps": 9, **ALONE}, {"steps": 11, **ALONE}])
    assert shown(one, range(20)) == shown(two, range(20))
    tenth = {"mixture": {"sources": {"p": {"weight": 1, "subset": "0.0-0.1"}}}}
    mixture = make([{"steps": 9, **ALONE}, {"steps": 9, **tenth}])
    stream = mixture.plan.phases[1].streams[0]
    assert stream.windows == one.plan.phases[0].streams[0].windows // 10
    assert len({tuple(sample) for sample in shown(mixture, range(9, 18))}) == stream.windows


def test_packs_of_another_length_are_read_from_their_start_or_refused(make: Make) -> None:
    longer = {"steps": 4, "sequence_length": 32, **ALONE}
    with pytest.raises(
        UserError,
        match=r"p1\.mixture\.sources\.p: source p is packed .* set `cursor: restart` here",
    ):
        make([{"steps": 4, **ALONE}, longer])
    mixture = make([{"steps": 4, **ALONE}, {**longer, "cursor": "restart"}])
    assert {len(sample) for sample in shown(mixture, range(4, 8))} & set(range(18, 34))


def test_what_a_sample_holds_can_be_named(make: Make) -> None:
    mixture = make([{"steps": 5, "mixture": {"sources": {"p": 0.6, "c": 0.4}}}])
    samples = shown(mixture, range(3, 4))
    for origin, sample in zip(mixture.describe(3), samples, strict=True):
        base = 100_000 if origin.stream.source == "c" else 0
        firsts = [(base + part.document.start + part.first, part.tokens) for part in origin.parts]
        assert [
            token for first, tokens in firsts for token in range(first, first + tokens)
        ] == sample
        assert origin.tokens == len(sample)


def test_without_data_packs_are_estimated_and_the_plan_says_so(make: Make) -> None:
    recipe = make([{"steps": 5, **ALONE}]).plan.recipe
    phase = recipe.phases[0].model_copy(
        update={"mixture": recipe.phases[0].mixture.model_validate({"sources": {"gone": 1}})}
    )
    stream = plan_with_data(recipe.model_copy(update={"phases": [phase]})).phases[0].streams[0]
    assert (stream.windows, stream.estimated) == (59, True)  # 1,000 tokens in full packs of 17
    assert not make([{"steps": 5, **ALONE}]).plan.phases[0].streams[0].estimated


def test_another_packing_is_another_past(make: Make) -> None:
    mixture = make([{"steps": 5, **ALONE}])
    recipe = mixture.plan.recipe
    sources = {**recipe.sources, "p": recipe.sources["p"].model_copy(update={"packing": None})}
    plain = make_plan(recipe.model_copy(update={"sources": sources}), {"p": TOKENS})
    changes = differences(fingerprint(mixture.plan, 5), fingerprint(plain, 5))
    assert any("packing: 'best_fit 1' before, absent now" in change for change in changes)


def test_packs_that_changed_since_the_plan_are_one_sentence(make: Make) -> None:
    mixture = make([{"steps": 5, **ALONE}])
    phase = mixture.plan.phases[0]
    promised = replace(phase.streams[0], windows=phase.streams[0].windows + 1)
    plan = replace(mixture.plan, phases=(replace(phase, streams=(promised,)),))
    with pytest.raises(UserError, match=r"sources\.p: has \d+ packs where the plan reads \d+"):
        OpenMixture(plan, mixture.sources)


def test_a_window_has_no_meaning_in_packs() -> None:
    recipe = recipe_of(
        {"p": {"path": "x", "packing": "best_fit", "window": 32}}, [{"steps": 1, **ALONE}]
    )
    assert "no effect with `packing: best_fit`" in str(check_recipe(recipe)[0])
    cached = recipe_of({"p": {"path": "x"}}, [{"steps": 1, **ALONE}], data={"pack_cache": "y"})
    assert "no effect without" in str(check_recipe(cached)[0])
