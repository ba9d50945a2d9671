"""Every family both ways: logits of Megatron-Core at TP 2 x PP 2 against transformers, and round trips bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megacode.convert.export import ExportSource, Wanted, export
from megacode.convert.importing import Found, import_model
from megacode.errors import UserError
from megacode.recipe.schema import Parallel
from tests.convert.models import MODELS, VOCAB, save_and_run, tokens_to_try
from tests.convert.runs import damage_tensors
from tests.processes import run_on

LAYOUT = Parallel(tensor=2, pipeline=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Checkpoints of all models, and their logits, from four processes."""
    folder = tmp_path_factory.mktemp("saved")
    results = run_on(4, save_and_run, str(folder), MODELS, LAYOUT, True, parallel=LAYOUT)
    last = [r for r in results if all(len(v) for v in r.values())]
    assert len(last) == 2
    return folder, {name: torch.cat([r[name] for r in last], -1)[..., :VOCAB] for name in MODELS}


def place(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "-").replace(",", "")


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported")
    for name in MODELS:
        source = ExportSource.open(place(saved[0], name))
        export(source, place(out, name), Wanted(name.split()[0], "fp32", shard_bytes=100_000))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, saved, exported) -> None:
    from transformers import AutoModelForCausalLM

    folder = place(exported, name)
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        theirs = model.eval()(tokens_to_try()).logits
    ours = saved[1][name]
    assert float(ours.std()) > 0.05, "nothing to tell apart"
    assert float((ours - theirs).abs().max()) < 1e-4
    assert bool((ours.argmax(-1) == theirs.argmax(-1)).all())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_back_and_forth_is_bit_exact(name, exported, tmp_path) -> None:
    folder = place(exported, name)
    before = tensors_of(folder)
    import_model(Found.open(folder), tmp_path / "imported", None)
    source = ExportSource.open(tmp_path / "imported")
    export(source, tmp_path / "again", Wanted(name.split()[0], "fp32"))
    after = tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for key, value in json.loads((folder / "config.json").read_text()).items():
        assert json.loads((tmp_path / "again" / "config.json").read_text())[key] == value


@pytest.mark.slow
def test_imported_weights_give_the_same_logits_in_another_layout(saved, exported, tmp_path) -> None:
    for name in MODELS:
        import_model(Found.open(place(exported, name)), place(tmp_path, name), None)
    plain = {k: m.model_copy(update={"rotary_interleaved": False}) for k, m in MODELS.items()}
    results = run_on(
        2,
        save_and_run,
        str(tmp_path),
        plain,
        Parallel(tensor=2),
        False,
        parallel=Parallel(tensor=2),
    )
    for name, expected in saved[1].items():
        got = torch.cat([r[name] for r in results], -1)[..., :VOCAB]
        assert float((got - expected).abs().max()) < 1e-4, name


@pytest.mark.slow
def test_many_files_are_indexed(exported) -> None:
    folder = place(exported, "llama")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(folder.glob("*.safetensors"))) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(folder).values())


@pytest.mark.slow
def test_what_is_broken_is_told(saved, exported, tmp_path) -> None:
    import shutil

    def copy(of: Path) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(of, tmp_path / "copy"))

    checkpoint, folder = place(saved[0], "llama"), place(exported, "llama")
    cut = copy(checkpoint)
    (cut / "megacode.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        ExportSource.open(cut)
    cut = copy(checkpoint)
    next(cut.glob("*.distcp")).unlink()
    with pytest.raises(UserError, match="is missing"):
        ExportSource.open(cut)
    cut = copy(checkpoint)
    for file in cut.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged or cut short"):
        ExportSource.open(cut)
    cut = copy(checkpoint)
    damage_tensors(cut)
    source = ExportSource.open(cut)
    with pytest.raises(UserError, match="damaged or cut short"):
        export(source, tmp_path / "out", Wanted(dtype="fp32"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    cut = copy(folder)
    next(cut.glob("model-00002*")).unlink()
    with pytest.raises(
        UserError, match="which model.safetensors.index.json names, is missing".replace(".", r"\.")
    ):
        Found.open(cut)
    cut = copy(folder)
    text = (cut / "config.json").read_text()
    for change, words in {
        '"LlamaForCausalLM"': (
            '"BertModel"',
            "BertModel, which cannot be imported; known are LlamaForCausalLM",
        ),
        '"intermediate_size": 200': ('"intermediate_size": 208', "asks for (208, 96)"),
        '"num_hidden_layers": 4': ('"num_hidden_layers": 5', "has no tensor model.layers.4"),
        '"hidden_act": "silu"': ('"hidden_act": "gelu"', "hidden_act is 'gelu'"),
        '"rope_theta": 500000': (
            '"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic"}',
            "type 'dynamic'",
        ),
    }.items():
        (cut / "config.json").write_text(text.replace(change, words[0]))
        with pytest.raises(UserError) as caught:
            import_model(Found.open(cut), tmp_path / "in", None)
        assert words[1] in str(caught.value) and not (tmp_path / "in").exists()
    with pytest.raises(UserError, match=r"qwen3: this model does not fit: model.qk_norm is false"):
        Wanted("qwen3").family_of(ExportSource.open(checkpoint))
