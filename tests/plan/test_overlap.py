"""What is on for which layout and hardware, why not otherwise, and what happens when it is asked for nevertheless."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacode.errors import UserError
from megacode.plan.devices import DEVICES
from megacode.plan.hardware import Hardware, assumed, fp8_refusal
from megacode.plan.overlap import decide_overlaps
from megacode.recipe.load import load_recipe

H100 = assumed("h100")
ENGINE_ONLY = Hardware("NVIDIA H100", (9, 0), (13, 0), (2, 12, 0))
BARE = Hardware("NVIDIA H100", (9, 0), (13, 0))
FUSIONS = {"rope", "cross_entropy", "activation", "bias_dropout", "gradient_accumulation"}

CASES: dict[str, tuple[Hardware, int, list[str], set[str]]] = {
    # name: (hardware, data-parallel ranks, changes, what is on)
    "cpu": (Hardware(), 2, [], set()),
    "one gpu": (H100, 1, [], FUSIONS),
    "data parallel": (H100, 8, [], FUSIONS | {"grad_reduce", "param_gather"}),
    "without Apex": (ENGINE_ONLY, 1, [], FUSIONS),
    "without Transformer Engine": (BARE, 2, [], {"grad_reduce", "param_gather", "activation", "bias_dropout"}),
    "no distributed optimizer": (H100, 2, ["parallel.distributed_optimizer=false"], FUSIONS | {"grad_reduce"}),
    "tensor parallel": (H100, 1, ["parallel.tensor=2"], FUSIONS),
    "sequence parallel": (H100, 1, ["parallel.tensor=2", "parallel.sequence=true"], FUSIONS | {"tensor"}),
    "context parallel": (H100, 1, ["parallel.context=2"], FUSIONS | {"grad_reduce", "param_gather"}),
    "fp32": (H100, 1, ["precision=fp32", "parallel.tensor=2", "parallel.sequence=true"], FUSIONS),
    "mxfp8 weights": (
        assumed("b200"), 8, ["precision={compute: fp8, fp8_recipe: mxfp8, fp8_params: true}"], FUSIONS | {"grad_reduce"},
    ),
    "two lengths": (
        H100, 1, ["parallel.tensor=2", "parallel.sequence=true", "phases.second.sequence_length=64"], FUSIONS,
    ),
    "pipeline": (H100, 1, ["parallel.pipeline=2"], FUSIONS),
    "interleaved": (H100, 1, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"], FUSIONS | {"pipeline"}),
    "geglu": (H100, 1, ["model.activation=geglu"], FUSIONS - {"activation"}),
    "yarn in a phase": (
        H100, 1, ["phases.second.rotary_scaling={kind: yarn, factor: 2, original_context_length: 128}"], FUSIONS - {"rope"},
    ),
    "interleaved positions": (H100, 1, ["model.rotary_interleaved=true"], FUSIONS),
    "interleaved positions, packed": (H100, 1, ["model.rotary_interleaved=true", "data.reset_at_eod=true"], FUSIONS - {"rope"}),
    "learned positions": (H100, 1, ["model.position_embedding=learned"], FUSIONS - {"rope"}),
    "graphs": (H100, 1, ["fusion.cuda_graphs=true"], FUSIONS | {"cuda_graphs"}),
    "turned off": (
        H100, 2, ["parallel.overlap={grad_reduce: false}", "fusion={rope: false, activation: false}"],
        FUSIONS - {"rope", "activation"},
    ),
    "asked for on gloo": (
        Hardware(), 2, ["parallel.overlap={grad_reduce: true, param_gather: true}"], {"grad_reduce", "param_gather"},
    ),
    "asked for where it is moot": (Hardware(), 1, ["parallel.overlap={grad_reduce: true, tensor: true}"], set()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_on(case: str, write) -> None:
    hardware, data, changes, expected = CASES[case]
    decided = decide_overlaps(load_recipe(write(), changes), hardware, data)
    assert {name for name, one in decided.items() if one.on} == expected
    assert all(one.why and one.key.endswith(name) for name, one in decided.items())


@pytest.mark.parametrize(
    ("hardware", "change", "says"),
    [
        (Hardware(), "fusion.rope=true", "fusion.rope: cannot be on: it needs Transformer Engine"),
        (BARE, "fusion.cross_entropy=true", "it needs Transformer Engine"),
        (Hardware(), "fusion.bias_dropout=true", "it needs a CUDA device"),
        (BARE, "fusion.gradient_accumulation=true", "it needs Transformer Engine or Apex"),
        (BARE, "fusion.cuda_graphs=true", "it needs Transformer Engine"),
        (H100, "{fusion.cuda_graphs: true, model.dropout: 0.1}", "dropout is drawn anew"),
        (H100, "{fusion.cuda_graphs: true, data.reset_at_eod: true}", "packs documents"),
        (H100, "{fusion.cuda_graphs: true, phases.second.rotary_base: 1e6}", "one kind of rotary positions"),
        (H100, "{fusion.cuda_graphs: true, phases.second.sequence_length: 64}", "several sequence lengths"),
        (H100, "parallel={tensor: 2, overlap: {tensor: true}}", "it needs parallel.sequence: true"),
        (H100, "parallel={tensor: 2, sequence: true, overlap: {tensor: true}}|precision=fp32", "precision is fp32"),
        (assumed("b200"), "parallel.overlap={param_gather: true}|precision={compute: fp8, fp8_recipe: mxfp8, fp8_params: true}",
         "gathered in the gradients' buffer"),
        (H100, "parallel.overlap={grad_reduce: false, param_gather: true}", "parallel.overlap.grad_reduce with it"),
        (Hardware("H100", (9, 0), (13, 0), (2, 2)),
         "{model.rotary_interleaved: true, fusion.rope: true}", "interleaved rotary positions need"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_key(
    hardware: Hardware, change: str, says: str, write
) -> None:
    changes = change.split("|")
    if change.startswith("{"):
        changes = [part.strip().replace(": ", "=") for part in change[1:-1].split(",")]
    with pytest.raises(UserError) as caught:
        decide_overlaps(load_recipe(write(), changes), hardware, 2)
    assert says in str(caught.value)
    assert "take the key out" in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- FP8

L40, A100, B200 = assumed("l40"), assumed("a100"), assumed("b200")


@pytest.mark.parametrize(
    ("recipe", "hardware", "why"),
    [
        ("delayed", Hardware(), "no CUDA device"),
        ("delayed", A100, "compute capability 8.0"),
        ("delayed", BARE, "no Transformer Engine"),
        ("delayed", L40, None),
        ("tensorwise", L40, None),
        ("blockwise", L40, "needs 9.0"),
        ("mxfp8", L40, "needs 10.0"),
        ("delayed", H100, None),
        ("tensorwise", H100, None),
        ("blockwise", H100, None),
        ("blockwise", Hardware("H100", (9, 0), (12, 6), (2, 12)), "CUDA 12.9"),
        (
            "tensorwise",
            Hardware("H100", (9, 0), (12, 6), (2, 1)),
            "came with Transformer Engine 2.2",
        ),
        ("mxfp8", H100, "needs 10.0"),
        ("mxfp8", B200, None),
        ("blockwise", B200, None),
        ("mxfp8", assumed("rtx-5090"), "needs 10.0"),
    ],
)
def test_fp8_is_refused_where_it_cannot_run(
    recipe: str, hardware: Hardware, why: str | None
) -> None:
    said = fp8_refusal(recipe, hardware)
    assert (said is None) if why is None else (said and why in said)


def test_every_device_of_the_table_with_fp8_can_run_it_here_too() -> None:
    for name, (_, peak) in DEVICES.items():
        if not name.startswith("mi"):
            assert (fp8_refusal("delayed", assumed(name)) is None) == (peak.fp8 is not None), name


MISTAKES = {
    "precision.fp8_params=true": "precision.fp8_params: needs `compute: fp8`",
    "precision.compare_every=10": "precision.compare_every: needs `compute: fp8`",
    "precision={compute: fp8, bf16_first_layers: 1}": "does not go with `fp8_recipe: delayed`",
    "precision={compute: fp8, fp8_params: true}|parallel.distributed_optimizer=false": "parallel.distributed_optimizer",
    "precision=fp8|phases.first.sequence_length=24": "24 rows",
    "precision={compute: fp8, fp8_recipe: mxfp8}|model.hidden_size=48": "multiples of 32",
    "precision=fp8|parallel={tensor: 4, sequence: true}|phases.first.sequence_length=32": "8 rows",
    "precision=fp8|model={hidden_size: 40}": "multiples of 16",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_fp8_that_cannot_be_is_a_sentence(mistake: str, write) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(write(), mistake.split("|"))
    assert MISTAKES[mistake] in str(caught.value)


def test_padding_lets_any_feed_forward_have_fp8(write) -> None:
    recipe = load_recipe(write(), ["precision=fp8", "model.ffn_size=165"])
    assert recipe.model.stored_ffn_size(1) == 256


def test_the_plan_shows_what_is_on(write, capsys: pytest.CaptureFixture[str]) -> None:
    from megacode.cli.main import main

    path: Path = write()
    assert (
        main(
            [
                "plan",
                str(path),
                "--set",
                "tokenizer=null",
                "--set",
                "model.vocab_size=100",
                "--gpus",
                "8",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "on    parallel.overlap.grad_reduce" in shown and "off   fusion.cuda_graphs" in shown
    changes = [
        "--set",
        "tokenizer=null",
        "--set",
        "model.vocab_size=100",
        "--set",
        "fusion.rope=false",
        "--set",
        "precision=fp8",
    ]
    assert main(["plan", str(path), *changes, "--device", "a100"]) == 0
    shown = capsys.readouterr().out
    assert "fp8 cannot run on a100" in " ".join(shown.split())
    assert "turned off in the recipe" in shown
