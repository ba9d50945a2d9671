"""The crystalcoder family both ways: Megatron-Core at TP 2 x PP 2 against the shipped remote code, and the published form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
import torch  # noqa: E402

from megacode.convert.export import ExportSource, Wanted, export  # noqa: E402
from megacode.convert.families.crystalcoder import CRYSTALCODER  # noqa: E402
from megacode.convert.importing import Found, import_model  # noqa: E402
from megacode.errors import UserError  # noqa: E402
from megacode.recipe.load import load_recipe  # noqa: E402
from megacode.recipe.schema import Model, Mup, Parallel  # noqa: E402
from tests.convert.models import VOCAB, save_and_run, tokens_to_try  # noqa: E402
from tests.convert.test_crystalcoder_remote_code import (  # noqa: E402
    CONFIG,
    expected_logits,
    load,
    weights,
    write_model,
)
from tests.convert.test_families import place, tensors_of  # noqa: E402
from tests.processes import run_on  # noqa: E402

SHAPE: dict[str, Any] = dict(layers=4, normalization="layernorm", linear_bias=True)
CRYSTAL = SHAPE | dict(
    hidden_size=96, heads=4, ffn_size=250, rotary_fraction=0.25, rotary_interleaved=True, tie_embeddings=True,
    mup=Mup(base_hidden_size=24, embedding_scale=14.6, output_alpha=2.22), init_std=0.073,
)  # fmt: skip
MODELS: dict[str, Model] = {
    "crystal": Model(**CRYSTAL),
    "halves, untied, softmax 1 over root": Model(
        **(CRYSTAL | dict(rotary_interleaved=False, tie_embeddings=False, softmax_scale=24**-0.5, rotary_base=5e5))
    ),
    "without mup": Model(**SHAPE, hidden_size=64, heads=4, ffn_size=100, rotary_fraction=0.625, rotary_interleaved=True),
    "learned, relu": Model(
        **SHAPE, hidden_size=64, heads=2, ffn_size=130, position_embedding="learned", activation="relu", context_length=40,
        tie_embeddings=True, mup=Mup(base_hidden_size=16, embedding_scale=3.0, output_alpha=2.0),
    ),
    "no positions, squared-relu": Model(
        **SHAPE, hidden_size=64, heads=2, position_embedding="none", activation="squared-relu", softmax_scale=1.0
    ),
}  # fmt: skip
LAYOUT = Parallel(tensor=2, pipeline=2)


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, module_cache: None
) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("saved")
    results = run_on(4, save_and_run, str(folder), MODELS, LAYOUT, True, parallel=LAYOUT)
    last = [r for r in results if all(len(v) for v in r.values())]
    return folder, {name: torch.cat([r[name] for r in last], -1)[..., :VOCAB] for name in MODELS}


@pytest.fixture(scope="module")
def exported(saved: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported")
    for name in MODELS:
        source = ExportSource.open(place(saved[0], name))
        export(source, place(out, name), Wanted("crystalcoder", "fp32", shard_bytes=200_000))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_remote_code(
    name: str, saved: tuple[Path, Any], exported: Path
) -> None:
    model = load(place(exported, name))
    with torch.no_grad():
        theirs = model(tokens_to_try()).logits
    ours = saved[1][name]
    assert float(ours.std()) > 0.05, "nothing to tell apart"
    assert float((ours - theirs).abs().max()) < 1e-4
    assert bool((ours.argmax(-1) == theirs.argmax(-1)).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crystal", "learned, relu"])
def test_logits_are_those_of_the_description(
    name: str, saved: tuple[Path, Any], exported: Path
) -> None:
    """Our remote code set aside: the exported numbers in the forward pass that the tests wrote from the description."""
    config = json.loads((place(exported, name) / "config.json").read_text())
    w = {key: value.numpy() for key, value in tensors_of(place(exported, name)).items()}
    for row, tokens in enumerate(tokens_to_try().numpy()):
        expected = expected_logits(config, w, tokens)
        assert np.abs(saved[1][name][row].numpy() - expected).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_back_and_forth_is_bit_exact(name: str, exported: Path, tmp_path: Path) -> None:
    folder = place(exported, name)
    import_model(Found.open(folder), tmp_path / "imported", None)
    source = ExportSource.open(tmp_path / "imported")
    export(source, tmp_path / "again", Wanted("crystalcoder", "fp32"))
    before, after = tensors_of(folder), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [
        json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again")
    ]
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_imported_weights_give_the_same_logits_in_another_layout(
    saved: tuple[Path, Any], exported: Path, tmp_path: Path
) -> None:
    models = {}
    for name in MODELS:
        import_model(Found.open(place(exported, name)), place(tmp_path, name), None)
        models[name] = load_recipe(place(tmp_path, name) / "recipe.yaml").model
    results = run_on(
        2,
        save_and_run,
        str(tmp_path),
        models,
        Parallel(tensor=2),
        False,
        parallel=Parallel(tensor=2),
    )
    for name, expected in saved[1].items():
        got = torch.cat([r[name] for r in results], -1)[..., :VOCAB]
        assert float((got - expected).abs().max()) < 1e-4, name


@pytest.mark.slow
def test_the_published_form_is_read(tmp_path: Path) -> None:
    """Config keys, names, mask buffers and .bin files as LLM360 published them, at a small size."""
    config = CONFIG | {"vocab_size": VOCAB, "n_embd": 64, "n_inner": 90, "rotary_dim": 4}
    w = weights(config)
    folder = write_model(
        tmp_path / "hf", config, {"transformer.wte.weight": w["transformer.wte.weight"]}
    )
    (folder / "model.safetensors").unlink()
    stored = {name: torch.from_numpy(value) for name, value in w.items()}
    stored["lm_head.weight"] = stored["transformer.wte.weight"]
    for i in range(config["n_layer"]):
        stored[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        stored[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    names = sorted(stored)
    halves = {
        "pytorch_model-00001-of-00002.bin": names[::2],
        "pytorch_model-00002-of-00002.bin": names[1::2],
    }
    for file, held in halves.items():
        torch.save({name: stored[name] for name in held}, folder / file)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, held in halves.items() for name in held},
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    found = Found.open(folder)
    assert found.model.mup == Mup(base_hidden_size=4, embedding_scale=14.6, output_alpha=2.22)
    assert (found.model.logit_scale, found.model.resolved_softmax_scale) == (2.22 * 0.0625, 1 / 16)
    import_model(found, tmp_path / "in", None)
    (got,) = run_on(1, save_and_run, str(tmp_path), {"in": found.model}, Parallel(), False)
    for row, tokens in enumerate(tokens_to_try().numpy()):
        expected = expected_logits(config, w, tokens)
        assert np.abs(got["in"][row, :, :VOCAB].numpy() - expected).max() < 1e-4 * max(
            1, np.abs(expected).max()
        )


def test_crystals_own_shape() -> None:
    """recipes/crystal-7b.yaml gives the published config.json, key by key, and that gives the recipe's model again."""
    published = {
        "attn_pdrop": 0.0, "scale_attn_weights": True, "resid_pdrop": 0.0, "mup_embeddings_scale": 14.6, "n_inner": 10922,
        "n_embd": 4096, "layer_norm_epsilon": 1e-05, "n_positions": 2048, "activation_function": "swiglu", "n_head": 32,
        "n_layer": 32, "mup_output_alpha": 2.22, "mup_width_scale": 0.0625, "position_embedding_type": "rotary",
        "rotary_dim": 32, "mup_scale_qk_dot_by_d": True, "embd_pdrop": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_crystalcoder.CrystalCoderConfig",
            "AutoModel": "modeling_crystalcoder.CrystalCoderModel",
            "AutoModelForCausalLM": "modeling_crystalcoder.CrystalCoderLMHeadModel",
        },
    }  # fmt: skip
    model = load_recipe(Path(__file__).parents[2] / "recipes" / "crystal-7b.yaml").model
    assert CRYSTALCODER.fits(model) is None
    config = CRYSTALCODER.config(model, 2048)
    assert config == published | {"initializer_range": 0.073}
    again = Model(**CRYSTALCODER.model_section(config | {"tie_word_embeddings": True}))
    ours = {
        "init_distribution",
        "embedding_init_std",
        "output_init_std",
        "vocab_size",
        "kv_heads",
        "head_dim",
        "pad_multiple",
    }
    for key in Model.model_fields.keys() - ours:
        assert getattr(again, key) == getattr(model, key), key
    names = [name for slot in CRYSTALCODER.slots(model) for name in slot.names]
    assert len(names) == len(set(names)) == 32 * 14 + 3
    assert {name for name in names if ".h.31." in name} == {
        f"transformer.h.31.{part}.{kind}"
        for part in (
            "ln_1",
            "ln_2",
            "attn.c_attn",
            "attn.c_proj",
            "mlp.c_fc",
            "mlp.c_fc2",
            "mlp.c_proj",
        )
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("dims", [(24, 10), (128, 32), (20, 6), (12, 2), (56, 22), (96, 38)])
def test_every_rotary_dim_comes_back(dims: tuple[int, int]) -> None:
    dim, rotated = dims
    config = CONFIG | {"n_embd": 2 * dim, "n_head": 2, "rotary_dim": rotated}
    model = Model(**CRYSTALCODER.model_section(config))
    assert int(model.resolved_head_dim * model.rotary_fraction) == rotated


def test_a_base_width_that_is_no_whole_number_keeps_the_logits() -> None:
    config = CONFIG | {"n_embd": 40, "n_head": 4, "rotary_dim": 4}
    model = Model(**CRYSTALCODER.model_section(config))
    assert model.mup and model.mup.base_hidden_size == 2  # 2.5
    assert model.logit_scale == pytest.approx(2.22 * 0.0625, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(kv_heads=2), "model.kv_heads is 2, not heads (4)"),
        (dict(qk_norm=True), "model.qk_norm is true, not false"),
        (dict(linear_bias=False), "model.linear_bias is false, not true"),
        (dict(normalization="rmsnorm"), "model.normalization is rmsnorm"),
        (dict(activation="geglu"), "model.activation is geglu"),
        (dict(head_dim=32), "model.head_dim is 32"),
        (dict(softmax_scale=0.3), "model.softmax_scale is 0.3"),
        (dict(rotary_fraction=0.3), "model.rotary_fraction rotates 7"),
        (dict(megatron={"num_moe_experts": 4}), "model.megatron.num_moe_experts"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], words: str) -> None:
    reason = CRYSTALCODER.fits(Model(**(CRYSTAL | change)))
    assert reason is not None and words in reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ({"activation_function": "tanh"}, "activation_function is 'tanh'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is not n_head"),
        ({"n_head": 5}, "n_embd 48 is not a multiple of n_head 5"),
    ],
)
def test_what_cannot_be_imported_is_told(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = write_model(
        tmp_path / "hf", CONFIG | change, {"transformer.wte.weight": np.zeros((97, 48), np.float32)}
    )
    with pytest.raises(UserError) as caught:
        Found.open(folder)
    assert words in str(caught.value) and str(folder / "config.json") in str(caught.value)
