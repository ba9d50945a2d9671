"""The average of weights: where masters come from, and the order of work on a device, with stand-ins for its streams."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from megacode.megatron.optimizer_state import split
from megacode.megatron.weight_ema import WeightEma, _own_master
from megacode.recipe.schema import Ema


def test_masters_of_the_precision_aware_optimizer() -> None:
    """16 bits beside the weight's 16; a type of its own, which it scales; none before the first step."""
    masters = torch.randn(1000)
    weight, remainder = split(masters)
    state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    adam = SimpleNamespace(
        param_groups=[{"params": [weight]}],
        state=state,
        get_unscaled_state=lambda parameter, name: state[parameter][name].float() * 2,
    )
    part = SimpleNamespace(model_param_group_index_map={weight: (0, 0)}, optimizer=adam)
    assert torch.equal(_own_master(part, weight), weight.float())
    state[weight] = {"master_param": remainder}
    assert torch.equal(_own_master(part, weight), masters)
    state[weight] = {"master_param": masters.half() / 2}
    assert torch.equal(_own_master(part, weight), (masters.half() / 2).float() * 2)


class Stream:
    """Notes what waits for what."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other: Stream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")


def test_the_update_runs_beside_the_model_and_the_optimizer_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    main, side = Stream("main", events), Stream("side", events)

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        events.append(f"on {stream.name}")
        yield
        events.append(f"off {stream.name}")

    for name, value in (
        ("is_available", lambda: True),
        ("Stream", lambda: side),
        ("current_stream", lambda: main),
        ("stream", on),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.SGD([weight], lr=1.0)
    chunk = SimpleNamespace(
        ddp_config=SimpleNamespace(use_distributed_optimizer=False), parameters=lambda: [weight]
    )
    ema = WeightEma(Ema(decay=0.5, every=2), SimpleNamespace(optimizer=adam), [chunk])
    ema.restart()
    weight.grad = torch.ones(3)
    for done in (1, 2):
        adam.step()
        ema.update(done)
    assert events == ["main waits for side"] * 2 + ["side waits for main", "on side", "off side"]
    assert torch.equal(ema._averages[0], torch.full((3,), 0.25 * 1 + 0.75 * -1))
    adam.step()
    assert events[5:] == ["main waits for side"]
