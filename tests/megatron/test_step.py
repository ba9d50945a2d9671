"""Document boundaries hide earlier documents; losses by stream and denominators; groups, rates and fresh Adam state."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from megacode.errors import UserError
from megacode.recipe.schema import (
    LearningRate,
    Mixture,
    Model,
    Optimizer,
    Parallel,
    ParameterGroup,
    Phase,
    Precision,
    Recipe,
)
from tests.processes import run_on

VOCAB, LENGTH, EOD = 100, 32, 2


def small(**optimizer: object) -> Recipe:
    phase = Phase(
        name="p", steps=1, batch_size=2, sequence_length=LENGTH, mixture=Mixture(sources={"a": 1.0}),
        learning_rate=LearningRate(peak=1e-2),
    )  # fmt: skip
    model = Model(layers=2, hidden_size=32, heads=2, init_std=0.3)
    return Recipe(
        name="t",
        model=model,
        sources={},
        phases=[phase],
        precision="fp32",
        optimizer=Optimizer(**optimizer),
    )


def windows(change: bool = False) -> np.ndarray:
    made = np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH + 1))
    made[:, 15] = EOD
    if change:
        made[:, 3] = 50 + made[:, 3] % 7  # in the first document only
    return made


def losses_by_position(world, reset: bool, **model: int) -> tuple[torch.Tensor, torch.Tensor]:
    from megacode.data.batch import make_batch
    from megacode.megatron.model import build_model
    from megacode.megatron.step import to_device

    torch.manual_seed(0)
    recipe = small()
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})
    (chunk,) = build_model(recipe, VOCAB)
    out = []
    with torch.no_grad():
        for change in (False, True):
            rows = make_batch(
                windows(change), np.zeros(2, np.int32), np.arange(2), eod_id=EOD, reset_at_eod=reset
            )
            batch = to_device(rows, world)
            out.append(chunk(batch.tokens, batch.position_ids, batch.mask, labels=batch.labels))
    return out[0], out[1]


def test_boundaries_hide_earlier_documents() -> None:
    ((before, after),) = run_on(1, losses_by_position, True)
    assert torch.equal(before[:, 16:], after[:, 16:]), "the second document saw the first"
    assert not torch.allclose(before[:, 3:15], after[:, 3:15])
    ((before, after),) = run_on(1, losses_by_position, False)
    assert not torch.allclose(before[:, 16:], after[:, 16:]), "without boundaries it does see it"


def windowed_losses(world) -> tuple[torch.Tensor, torch.Tensor]:
    return losses_by_position(world, True, sliding_window=12)


def test_boundaries_hide_earlier_documents_from_a_window_too() -> None:
    ((before, after),) = run_on(1, windowed_losses)
    assert torch.equal(before[:, 16:], after[:, 16:]), "the second document saw the first"


def sums_and_updates(world, recipe: Recipe) -> dict:
    from megacode.data.batch import make_batch
    from megacode.megatron.config import megatron_config
    from megacode.megatron.model import build_model, global_parameter_names
    from megacode.megatron.optimizer import build_optimizer, set_lr, wrap_data_parallel
    from megacode.megatron.optimizer_state import inner_optimizers, reset_optimizer_state
    from megacode.megatron.step import prepare_model_for_training, train_step

    torch.manual_seed(0)
    config = megatron_config(recipe)
    chunks = wrap_data_parallel(config, build_model(recipe, VOCAB, config))
    optimizer = build_optimizer(recipe, chunks)
    prepare_model_for_training(chunks, optimizer)
    first = {name: p.detach().clone() for name, p in global_parameter_names(chunks).items()}
    rows = windows()
    parts = [
        make_batch(
            rows[i : i + 1],
            np.array([i], np.int32),
            np.array([i]),
            lengths=np.array([LENGTH + 1 - 8 * i]),
        )
        for i in range(2)
    ]
    set_lr(optimizer, 1e-2, 0.5)
    sums, norm = train_step(chunks, optimizer, parts, 2, recipe, world)
    moved = {
        n: float((p - first[n]).abs().max()) for n, p in global_parameter_names(chunks).items()
    }
    rates = {(g["lr"], g["weight_decay"]) for g in optimizer.param_groups if g["params"]}
    moments = [
        float(s["exp_avg"].abs().sum())
        for inner in inner_optimizers(optimizer)
        for s in inner.state.values()
    ]
    reset_optimizer_state(optimizer)
    after = [
        float(s["exp_avg"].abs().sum() + s["step"])
        for i in inner_optimizers(optimizer)
        for s in i.state.values()
    ]
    return {
        "sums": sums,
        "norm": norm,
        "moved": moved,
        "rates": rates,
        "moments": sum(moments),
        "after": sum(after),
    }


def test_sums_by_stream_rates_by_group_and_fresh_state() -> None:
    recipe = small(groups=[ParameterGroup(match="*.linear_fc1.weight", lr_mult=0.0)], clip_grad=0.0)
    (found,) = run_on(1, sums_and_updates, recipe)
    assert found["sums"][1].tolist() == [32.0, 24.0]  # labels that count, by stream
    assert found["moved"]["decoder.layers.0.mlp.linear_fc1.weight"] == 0
    assert found["moved"]["decoder.layers.1.mlp.linear_fc2.weight"] > 1e-3
    assert found["rates"] == {
        (1e-2, 0.5),
        (0.0, 0.5),
        (1e-2, 0.0),
    }  # matrices; the group; biases and norms
    assert found["moments"] > 0 and found["after"] == 0


def test_a_tied_output_layer_is_updated_as_its_embedding() -> None:
    """On the last stage of a pipeline it is a copy with a name of its own."""
    from megacode.megatron.optimizer import _names_of_weights

    stage = torch.nn.Module()
    stage.output_layer = torch.nn.Linear(2, 2, bias=False)
    for tied, name in ((True, "embedding.word_embeddings.weight"), (False, "output_layer.weight")):
        recipe = small().model_copy(
            update={"model": small().model.model_copy(update={"tie_embeddings": tied})}
        )
        assert list(_names_of_weights(recipe, [stage])) == [name]


def test_the_denominator_is_tokens_or_positions() -> None:
    by_tokens, by_positions = (
        run_on(1, sums_and_updates, small(clip_grad=0.0, loss_denominator=kind))[0]
        for kind in ("tokens", "positions")
    )
    np.testing.assert_allclose(by_tokens["norm"] / by_positions["norm"], 64 / 56, rtol=1e-5)


def refusals(world) -> list[str]:
    from megacode.megatron.config import megatron_config
    from megacode.megatron.model import build_model
    from megacode.megatron.optimizer import build_optimizer, wrap_data_parallel

    said = []
    for changes in (
        {"parallel": Parallel(context=2)},
        {"parallel": Parallel(ddp={"average_in_collective": True})},
        {"optimizer": Optimizer(megatron={"optimizer_cpu_offload": True})},
        {"optimizer": Optimizer(megatron={"use_precision_aware_optimizer": True})},
    ):
        recipe = small().model_copy(update=changes)
        with pytest.raises(UserError) as error:
            config = megatron_config(recipe)
            build_optimizer(recipe, wrap_data_parallel(config, build_model(recipe, VOCAB, config)))
        said.append(str(error.value))
    return said


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="about a machine without CUDA and Transformer Engine"
)
def test_what_cannot_be_here_is_refused_in_a_sentence() -> None:
    ((context, average, offload, aware),) = run_on(1, refusals)
    assert "needs Transformer Engine" in context
    assert average.startswith(
        "parallel.ddp: Megatron-Core refuses a field of it (average_in_collective): "
    )
    assert "optimizer_cpu_offload: there is nothing to offload without a CUDA device" in offload
    assert "needs Transformer Engine's FusedAdam" in aware


def own_slices(world) -> tuple[list[int], list[int]]:
    from megacode.data.batch import make_batch
    from megacode.megatron.step import to_device

    rows = np.arange(2 * 9).reshape(2, 9)
    own = to_device(make_batch(rows, np.zeros(2, np.int32), np.arange(2)), world)
    assert (own.tokens + 1 == own.labels).all() and own.loss_mask.shape == own.tokens.shape
    return own.tokens[1].tolist(), own.position_ids[1].tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on gloo")
def test_a_context_rank_has_the_first_and_the_last_of_as_many_slices() -> None:
    """So that both have the same causal work: quarters 0 and 3, 1 and 2."""
    first, second = run_on(2, own_slices, parallel=Parallel(context=2))
    assert first == ([9, 10, 15, 16], [0, 1, 6, 7])
    assert second == ([11, 12, 13, 14], [2, 3, 4, 5])


def losses_by_weights(world) -> tuple[list[list[float]], str]:
    """Of four steps with bf16 weights, and with what Megatron-Core does with mxfp8 ones: they share the gradients' buffer.
    And what is said of sizes that it would mix up."""
    from megatron.core.distributed import DistributedDataParallelConfig, param_and_grad_buffer

    from megacode.data.batch import make_batch
    from megacode.megatron.config import data_parallel_fields, megatron_config
    from megacode.megatron.model import build_model
    from megacode.megatron.optimizer import build_optimizer, set_lr, wrap_data_parallel
    from megacode.megatron.step import gathered_weights, prepare_model_for_training, train_step

    batch = [make_batch(windows(), np.zeros(2, np.int32), np.arange(2))]
    mxfp8 = Precision(compute="fp8", fp8_recipe="mxfp8", fp8_params=True)

    def wrapped(width: int, precision: Precision):
        model = Model(layers=2, hidden_size=width, heads=2, init_std=0.3)
        recipe = small().model_copy(update={"precision": precision, "model": model})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                param_and_grad_buffer, "is_mxfp8tensor", lambda weight: precision == mxfp8
            )
            half = recipe.model_copy(update={"precision": Precision(compute="bf16")})
            config = megatron_config(half, data_size=world.data_size)
            on = {name: one.on for name, one in config.overlaps.items()}
            buffers = DistributedDataParallelConfig(
                **data_parallel_fields(recipe, on)
            )  # of weights that this machine has not
            config = replace(config, recipe=recipe, data_parallel=buffers)
            return recipe, wrap_data_parallel(config, build_model(recipe, VOCAB, config))

    out: list[list[float]] = []
    for precision in (Precision(compute="bf16"), mxfp8):
        recipe, chunks = wrapped(64, precision)
        optimizer = build_optimizer(recipe, chunks)
        prepare_model_for_training(chunks, optimizer)
        out.append([])
        for _ in range(4):
            set_lr(optimizer, 1e-2, 0.1)
            sums, norm = train_step(chunks, optimizer, batch, 1, recipe, world)
            out[-1] += [float(sums[0, 0]), norm]
        with gathered_weights(chunks):
            out[-1].append(
                sum(
                    float(weight.detach().double().abs().sum()) for weight in chunks[0].parameters()
                )
            )
    with pytest.raises(UserError) as caught:
        wrapped(32, mxfp8)
    return out, str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for mxfp8 weights")
def test_weights_that_share_the_gradients_buffer_are_trained_as_others() -> None:
    (((plain, shared), said),) = run_on(1, losses_by_weights)
    assert plain[-3] < 0.9 * plain[0], "the model does not learn"
    assert shared == plain
    assert "layernorm.weight has 32" in said


def precisions_seen(world) -> list[tuple[str | None, float]]:
    """What the layers are told, and the loss, in a comparison and in the step after it."""
    from megacode.data.batch import make_batch
    from megacode.megatron.config import megatron_config
    from megacode.megatron.model import build_model
    from megacode.megatron.optimizer import wrap_data_parallel
    from megacode.megatron.step import forward_backward, without_fp8

    recipe = small()
    config = megatron_config(recipe)
    chunks = wrap_data_parallel(config, build_model(recipe, VOCAB, config))
    config.transformer.fp8 = "hybrid"  # without Transformer Engine it changes no number
    batch = [make_batch(windows(), np.zeros(2, np.int32), np.arange(2))]
    seen: list[str | None] = []
    chunks[0].module.decoder.register_forward_pre_hook(
        lambda block, _: seen.append(block.config.fp8)
    )
    losses = []
    with without_fp8(chunks), torch.no_grad():
        losses.append(
            float(forward_backward(chunks, batch, 1, recipe, world, forward_only=True)[0, 0])
        )
    assert all(p.main_grad.abs().max() == 0 for p in chunks[0].parameters()), (
        "a comparison leaves no gradient"
    )
    losses.append(float(forward_backward(chunks, batch, 1, recipe, world)[0, 0]))
    return list(zip(seen, losses, strict=True))


def test_a_comparison_computes_without_fp8_and_the_step_with_it() -> None:
    (((first, loss), (second, same)),) = run_on(1, precisions_seen)
    assert (first, second) == (None, "hybrid")
    assert loss == same


def test_what_is_not_training_runs_without_recorded_graphs() -> None:
    from megacode.megatron.workarounds import without_graphs

    chunk = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    graphs = torch.nn.Identity()
    chunk[0].cudagraph_manager = graphs  # as Megatron-Core gives one to every layer
    with without_graphs([chunk]):
        assert not hasattr(chunk[0], "cudagraph_manager")
    assert chunk[0].cudagraph_manager is graphs and not hasattr(chunk[1], "cudagraph_manager")


def test_every_share_of_the_batch_and_every_stage_drops_other_units() -> None:
    """But tensor-parallel ranks draw alike where Megatron-Core wants them to; and the first rank as it always did."""
    from megacode.megatron.distributed import World, dropout_seed

    def seeds(step: int) -> dict[tuple[int, ...], int]:
        sizes = dict(size=16, device="cpu", pipeline_size=2, data_size=2, context_size=2)
        return {
            (tensor, *place): dropout_seed(7, step, World(
                rank=0, tensor_rank=tensor, pipeline_rank=place[0], data_rank=place[1], context_rank=place[2], **sizes))
            for tensor in (0, 1) for place in itertools.product((0, 1), repeat=3)
        }  # fmt: skip

    first, second = seeds(0), seeds(1)
    assert all(seed == first[(0, *place)] for (_, *place), seed in first.items())
    assert len({*first.values(), *second.values()}) == 2 * 8
    assert first[0, 0, 0, 0] == 7 * 1_000_003


def gradients(
    world, recipe: Recipe, weights: tuple[float, ...] | None, rows: list[int], rank_rows: bool
) -> torch.Tensor:
    """All gradients, end to end, of a step of samples of 32, 24 ... trained tokens: sample i is of stream i."""
    from megacode.data.batch import make_batch
    from megacode.megatron.config import megatron_config
    from megacode.megatron.model import build_model, global_parameter_names
    from megacode.megatron.optimizer import build_optimizer, wrap_data_parallel
    from megacode.megatron.step import forward_backward, prepare_model_for_training

    torch.manual_seed(0)
    config = megatron_config(recipe)
    chunks = wrap_data_parallel(config, build_model(recipe, VOCAB, config))
    prepare_model_for_training(chunks, build_optimizer(recipe, chunks))
    for chunk in chunks:
        chunk.zero_grad_buffer()
    mine = [rows[world.data_rank]] if rank_rows else rows
    parts = [
        make_batch(
            windows()[i : i + 1],
            np.array([i], np.int32),
            np.array([i]),
            lengths=np.array([LENGTH + 1 - 8 * i]),
        )
        for i in mine
    ]
    sums = forward_backward(chunks, parts, 2, recipe, world, loss_weights=weights)
    assert sums[1].tolist() == [LENGTH - 8 * i if i in mine else 0 for i in range(2)], (
        "reported tokens have no weight"
    )
    return torch.cat(
        [p.main_grad.flatten().clone() for p in global_parameter_names(chunks).values()]
    )


def weighted_gradients(world, denominator: str) -> list[torch.Tensor]:
    recipe, cases = (
        small(loss_denominator=denominator),
        (None, (1.0, 1.0), (3.0, 3.0), (1.0, 0.3), (1.0, 0.0)),
    )
    alone = [gradients(world, recipe, None, [i], False) for i in range(2)]
    return [*alone, *(gradients(world, recipe, case, [0, 1], False) for case in cases)]


@pytest.mark.parametrize("denominator", ["tokens", "positions"])
def test_loss_weights_are_those_of_a_weighted_mean(denominator: str) -> None:
    """sum(w loss) / sum(w): of the gradients of each sample alone, by hand."""
    ((first, second, plain, ones, threes, mixed, only),) = run_on(
        1, weighted_gradients, denominator
    )
    counts = (32, 24) if denominator == "tokens" else (32, 32)

    def mean(a: float, b: float) -> torch.Tensor:
        a, b = a * counts[0], b * counts[1]
        return (a * first + b * second) / (a + b)

    for found, expected in (
        (plain, mean(1, 1)),
        (ones, plain),
        (threes, plain),
        (mixed, mean(1, 0.3)),
        (only, first),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(mixed, plain, rtol=1e-2)


def on_ranks(world, rank_rows: bool) -> torch.Tensor:
    whole = small().model_copy(update={"parallel": Parallel(distributed_optimizer=False)})
    return gradients(world, whole, (1.0, 0.3), [0, 1], rank_rows)


def test_loss_weights_are_the_same_on_two_ranks() -> None:
    (alone,) = run_on(1, on_ranks, False)
    for found in run_on(2, on_ranks, True):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-6)
