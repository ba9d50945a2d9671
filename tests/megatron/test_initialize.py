"""Initial weights: by role as the recipe says, the same numbers in every layout, and padding that is zero."""

from __future__ import annotations

import numpy as np
import pytest

from megacode.recipe.schema import LearningRate, Mixture, Model, Mup, Parallel, Phase, Recipe
from tests.processes import run_on

VOCAB = 500
CRYSTAL = Model(
    layers=2, hidden_size=256, heads=4, ffn_size=682, normalization="layernorm", linear_bias=True, rotary_fraction=0.25,
    rotary_interleaved=True, tie_embeddings=True, init_std=0.073, embedding_init_std=0.073,
    init_distribution="truncated_normal", mup=Mup(base_hidden_size=64, embedding_scale=14.6, output_alpha=2.22),
)  # fmt: skip
UNTIED = Model(
    layers=2, hidden_size=64, heads=4, kv_heads=2, ffn_size=200, position_embedding="learned"
)


def recipe(model: Model, **parallel: int) -> Recipe:
    phase = Phase(name="p", steps=1, batch_size=2, sequence_length=32, mixture=Mixture(sources={"a": 1.0}),
                  learning_rate=LearningRate(peak=1e-3))  # fmt: skip
    return Recipe(
        name="t",
        model=model,
        sources={},
        phases=[phase],
        precision="fp32",
        parallel=Parallel(**parallel),
    )


def shards(world, model: Model, parallel: dict[str, int]):
    from megatron.core import parallel_state

    from megacode.megatron.model import build_model, global_parameter_names

    chunks = build_model(recipe(model, **parallel), VOCAB)
    names = global_parameter_names(chunks)
    rank = parallel_state.get_tensor_model_parallel_rank()
    return rank, {name: p.detach().numpy() for name, p in names.items()}


def assembled(model: Model, results) -> dict[str, np.ndarray]:
    """Whole matrices without padding from the shards of all ranks."""
    pieces: dict[str, dict[int, np.ndarray]] = {}
    for rank, names in results:
        for name, value in names.items():
            pieces.setdefault(name, {})[rank] = value
    whole = {}
    for name, parts in pieces.items():
        shares = [parts[rank] for rank in sorted(parts)]
        if name.endswith(("linear_fc1.weight", "linear_fc1.bias")) and model.gated:
            halves = [np.split(share, 2) for share in shares]
            gate, up = (
                np.concatenate([h[i] for h in halves])[: model.resolved_ffn_size] for i in (0, 1)
            )
            whole[name] = np.concatenate([gate, up])
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            inner = model.resolved_ffn_size if "fc2" in name else None
            whole[name] = np.concatenate(shares, axis=1)[:, :inner]
        elif "norm" in name or "position" in name or name.endswith(("proj.bias", "fc2.bias")):
            whole[name] = shares[0]
        else:
            limit = (
                VOCAB
                if name in ("embedding.word_embeddings.weight", "output_layer.weight")
                else None
            )
            whole[name] = np.concatenate(shares)[:limit]
    return whole


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, np.ndarray]]:
    models = {"crystal": CRYSTAL, "untied": UNTIED}
    return {name: assembled(model, run_on(1, shards, model, {})) for name, model in models.items()}


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}])
@pytest.mark.parametrize("name", ["crystal", "untied"])
def test_every_layout_starts_from_the_same_numbers(name, layout, single) -> None:
    model = {"crystal": CRYSTAL, "untied": UNTIED}[name]
    got = assembled(model, run_on(2, shards, model, layout, parallel=Parallel(**layout)))
    if model.tie_embeddings and "pipeline" in layout:
        np.testing.assert_array_equal(
            got.pop("output_layer.weight"), got["embedding.word_embeddings.weight"]
        )
    assert got.keys() == single[name].keys()
    for key, value in single[name].items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)


def grown(world, model: Model, parallel: dict[str, int], old: int, rows: str):
    """Shards of a model whose rows from `old` on were not in the weights that it starts from."""
    from megatron.core import parallel_state

    from megacode.megatron.initialize import fill_new_rows
    from megacode.megatron.model import build_model, global_parameter_names

    names = global_parameter_names(build_model(recipe(model, **parallel), VOCAB))
    rank = parallel_state.get_tensor_model_parallel_rank()
    matrices = {
        name: p
        for name, p in names.items()
        if name.endswith(("word_embeddings.weight", "output_layer.weight"))
    }
    for parameter in matrices.values():
        first = rank * len(parameter)
        parameter.data[max(old - first, 0) : max(VOCAB - first, 0)] = 7  # whatever is there
    settings = recipe(model, **parallel).model_copy(
        update={"initialize_from": "there", "initialize_new_rows": rows}
    )
    fill_new_rows(names, settings, old, VOCAB)
    padding = sum(
        int(p.data[max(VOCAB - rank * len(p), 0) :].count_nonzero()) for p in matrices.values()
    )
    return rank, {name: p.detach().numpy() for name, p in matrices.items()}, padding


@pytest.mark.parametrize("rows", ["mean", "init"])
@pytest.mark.parametrize("old", [200, 499])  # on both sides of the border between two ranks
@pytest.mark.parametrize("name", ["crystal", "untied"])
def test_new_rows_are_the_mean_of_the_others_or_drawn_in_every_layout(
    name, old, rows, single
) -> None:
    model = {"crystal": CRYSTAL, "untied": UNTIED}[name]
    for layout in ({}, {"tensor": 2}, {"pipeline": 2}):
        results = run_on(
            2 if layout else 1, grown, model, layout, old, rows, parallel=Parallel(**layout)
        )
        assert not any(padding for *_, padding in results)
        for key, value in assembled(model, [result[:2] for result in results]).items():
            before = single[name][
                key if key in single[name] else "embedding.word_embeddings.weight"
            ]
            np.testing.assert_array_equal(value[:old], before[:old])
            mean = before[:old].astype(np.float64).mean(0).astype(np.float32)
            wanted = np.broadcast_to(mean, value[old:].shape) if rows == "mean" else before[old:]
            np.testing.assert_array_equal(value[old:], wanted)


def test_crystals_published_deviations_by_role(single) -> None:
    """At the published width the same rule gives 0.073, 0.01825 and 0.00228125."""
    published = CRYSTAL.model_copy(
        update={
            "layers": 32,
            "hidden_size": 4096,
            "heads": 32,
            "ffn_size": 10922,
            "mup": Mup(base_hidden_size=256),
        }
    )
    assert published.resolved_embedding_init_std == 0.073
    assert published.hidden_init_std == pytest.approx(0.01825, rel=1e-12)
    assert published.residual_init_std == pytest.approx(0.00228125, rel=1e-12)
    assert published.resolved_softmax_scale == 1 / 128
    wanted = {
        "linear_qkv": 0.0365,
        "linear_fc1": 0.0365,
        "linear_proj": 0.01825,
        "linear_fc2": 0.01825,
        "word_": 0.073,
    }
    cut = 0.87962566  # deviation of a unit normal cut at +-2
    for name, weight in single["crystal"].items():
        role = next((std for part, std in wanted.items() if part in name), None)
        if "norm" in name:
            assert (weight == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert not weight.any(), name
        else:
            assert role is not None, name
            assert weight.std() == pytest.approx(role * cut, rel=0.02), name
            assert np.abs(weight).max() <= 2 * role, name


def test_layers_and_seeds_draw_different_numbers(single) -> None:
    first, second = (single["untied"][f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in (0, 1))
    assert not np.array_equal(first, second)
    gate, up = np.split(first, 2)
    assert not np.array_equal(gate, up)


def batches(step: int):
    """One micro-batch of two sequences that climb by small steps, so that a loss can fall."""
    from megacode.data.batch import make_batch

    climbs = np.random.default_rng(step).integers(1, 4, (2, 33)).cumsum(axis=1) % VOCAB
    return [make_batch(climbs, np.zeros(2, np.int32), np.arange(2))]


def trained(world, steps: int, pad: int, tensor: int):
    """Losses of some steps, and what the padding holds after them."""
    from megacode.megatron.config import megatron_config
    from megacode.megatron.model import build_model, global_parameter_names
    from megacode.megatron.optimizer import build_optimizer, set_lr, wrap_data_parallel
    from megacode.megatron.step import prepare_model_for_training, train_step

    model = CRYSTAL.model_copy(update={"pad_multiple": pad})
    settings = recipe(model, tensor=tensor)
    config = megatron_config(settings, data_size=world.data_size)
    chunks = wrap_data_parallel(config, build_model(settings, VOCAB, config))
    optimizer = build_optimizer(settings, chunks)
    prepare_model_for_training(chunks, optimizer)
    losses = []
    for step in range(steps):
        set_lr(optimizer, 0.003, 0.1)
        sums, norm = train_step(chunks, optimizer, batches(step), 1, settings, world)
        losses.append((float(sums[0].sum() / sums[1].sum()), norm))
    names = global_parameter_names(chunks)
    padding = 0.0
    first = world.tensor_rank * (config.transformer.ffn_hidden_size // tensor)
    for name, p in names.items():
        if ".mlp.linear_fc" in name and not name.endswith("fc2.bias"):
            value = p.detach()
            if "fc1" in name:
                value = value.reshape(2, -1, *value.shape[1:]).movedim(1, 0)
            elif name.endswith("fc2.weight"):
                value = value.T
            padding = max(padding, float(value[max(682 - first, 0) :].abs().sum()))
        elif name == "embedding.word_embeddings.weight":
            own = max(VOCAB - world.tensor_rank * p.shape[0], 0)
            padding = max(padding, float(p.detach()[own:].abs().sum()))
    stored = {name: tuple(p.shape) for name, p in names.items()}
    return losses, padding, stored["decoder.layers.0.mlp.linear_fc2.weight"]


@pytest.mark.slow
def test_padding_changes_nothing() -> None:
    """Twenty steps, fp32: with padding, and with padding on two ranks, where the last one holds all of it."""
    ((plain, _, shape),) = run_on(1, trained, 20, 1, 1)
    assert shape == (256, 682)
    ((padded, rest, shape),) = run_on(1, trained, 20, 512, 1)
    assert shape == (256, 1024)
    split = run_on(2, trained, 20, 512, 2, parallel=Parallel(tensor=2))
    assert plain[-1][0] < plain[0][0] - 0.5, "the model does not learn"
    plain, padded, split_losses = np.array(plain), np.array(padded), np.array(split[0][0])
    np.testing.assert_allclose(padded[:, 0], plain[:, 0], rtol=1e-6)
    np.testing.assert_allclose(padded[:, 1], plain[:, 1], rtol=1e-5)
    np.testing.assert_allclose(split_losses[:, 0], plain[:, 0], rtol=1e-6)
    assert rest == 0.0 and all(result[1] == 0.0 for result in split)


def test_padded_sizes() -> None:
    published = Model(layers=32, hidden_size=4096, heads=32, ffn_size=10922)
    for tensor in (1, 2, 4, 8, 16):
        stored = published.stored_ffn_size(tensor)
        assert stored == 11008 and stored // tensor % 16 == 0
    assert published.stored(32032, 8) == 32128
    assert published.model_copy(update={"pad_multiple": 1}).stored_ffn_size(2) == 10922
