"""Config files that say a thing twice, or not at all: as transformers reads them, or refused with both values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from megacode.convert.checkpoint_reader import CheckpointReader  # noqa: E402
from megacode.convert.families import by_architecture  # noqa: E402
from megacode.convert.importing import Found, import_model  # noqa: E402
from megacode.convert.layout import EMBEDDING, OUTPUT  # noqa: E402
from megacode.errors import UserError  # noqa: E402

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "vocab_size": 100,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "stablelm": "StableLm",
    "starcoder2": "Starcoder2", "gpt_neox": "GPTNeoX",
}  # fmt: skip


def section_of(kind: str, keys: dict[str, Any]) -> dict[str, Any]:
    architecture = f"{CLASSES[kind]}ForCausalLM"
    more = {"use_parallel_residual": False} if kind == "gpt_neox" else {}
    family = by_architecture([architecture], kind, "config.json")
    return family.model_section(
        {"architectures": [architecture], "model_type": kind, **SIZES, **more, **keys}
    )


def theirs(kind: str, keys: dict[str, Any]) -> Any:
    return getattr(transformers, f"{CLASSES[kind]}Config").from_dict(
        {"model_type": kind, **SIZES, **keys}
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_a_silent_config_means_what_it_means_to_transformers(kind: str) -> None:
    ours, config = section_of(kind, {}), theirs(kind, {})
    rope = config.rope_parameters
    wanted = {
        "kv_heads": getattr(config, "num_key_value_heads", None), "head_dim": getattr(config, "head_dim", None),
        "norm_epsilon": next(v for k, v in vars(config).items() if k in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")),
        "tie_embeddings": config.tie_word_embeddings, "rotary_base": rope["rope_theta"],
        "rotary_fraction": rope.get("partial_rotary_factor", 1),
        "context_length": config.max_position_embeddings, "sliding_window": getattr(config, "sliding_window", None),
        "no_rope_layer_interval": getattr(config, "no_rope_layer_interval", None),
    }  # fmt: skip
    assert {key: ours[key] for key in wanted if key in ours} == {
        key: wanted[key] for key in wanted if key in ours
    }
    assert ours.get("head_dim") in (None, wanted["head_dim"])


@pytest.mark.parametrize(
    ("keys", "base", "words"),
    [
        ({"rope_theta": 500000.0}, 500000, None),
        ({"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}, 500000, None),
        ({"rope_scaling": {"rope_theta": 500000.0, "rope_type": "default"}}, 500000, None),
        ({"rope_scaling": {"rope_theta": 500000.0, "type": "linear", "factor": 2.0}}, 500000, None),
        ({"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, 500000, None),
        ({"rope_theta": 500000.0, "rope_parameters": {"rope_type": "default"}}, 500000, None),
        # As transformers 4.57 saves a config of version 5: its default beside what it did not read.
        ({"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}, 500000, None),
        ({"rope_theta": 10000.0, "rope_scaling": {"rope_theta": 500000.0, "rope_type": "default"}}, 500000, None),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 500000.0}}, None, ("1000000.0", "500000.0")),
        ({"rope_theta": 500000.0, "rope_parameters": {"rope_theta": 10000.0}}, None, ("500000.0", "10000.0")),
        ({"rope_scaling": {"rope_theta": 1e6}, "rope_parameters": {"rope_theta": 5e5}}, None, ("1000000.0", "500000.0")),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            None, ("2.0", "4.0"),
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, None, ("full_attention",)),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, None, ("partial_rotary_factor", "0.5")),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}}, 10000, None),
        ({"rope_scaling": LLAMA3, "max_position_embeddings": 8192}, 10000, None),
        ({"rope_scaling": LLAMA3, "max_position_embeddings": 131072}, 10000, None),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 8192, "max_position_embeddings": 131072},
            None, ("8192", "131072"),
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, None, ("low_freq_factor is missing",)),
    ],
)  # fmt: skip
def test_rotary_keys_are_read_as_transformers_does_or_refused(
    keys: dict[str, Any], base: float | None, words: tuple[str, ...] | None
) -> None:
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        if words:
            with pytest.raises(UserError) as error:
                section_of(kind, keys)
            assert all(word in str(error.value) for word in words), error.value
            continue
        section, rope = (
            section_of(kind, keys),
            theirs(kind, json.loads(json.dumps(keys))).rope_parameters,
        )
        assert section["rotary_base"] == base == rope["rope_theta"]
        scaling = section.get("rotary_scaling")
        assert (scaling["kind"] if scaling else "default") == rope["rope_type"]
        assert scaling is None or scaling["factor"] == rope["factor"]
        original = (scaling or {}).get("original_context_length")
        assert original == rope.get("original_max_position_embeddings")


@pytest.mark.parametrize(
    ("kind", "keys", "fraction", "words"),
    [
        ("stablelm", {"partial_rotary_factor": 0.5}, 0.5, None),
        ("stablelm", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 0.5, None),
        ("stablelm", {"partial_rotary_factor": 0.25, "rope_parameters": {"partial_rotary_factor": 0.5}}, 0.5, None),
        ("stablelm", {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}}, None, ("1.0", "0.5")),
        ("gpt_neox", {"rotary_pct": 1.0}, 1.0, None),
        ("gpt_neox", {"rotary_pct": 0.25, "rope_parameters": {"partial_rotary_factor": 1.0}}, 1.0, None),
        ("gpt_neox", {"rotary_emb_base": 5e5, "rope_parameters": {"rope_theta": 2e5}}, None, ("500000.0", "200000.0")),
    ],
)  # fmt: skip
def test_so_is_the_share_that_is_rotated(
    kind: str, keys: dict[str, Any], fraction: float | None, words: tuple[str, ...] | None
) -> None:
    if words:
        with pytest.raises(UserError) as error:
            section_of(kind, keys)
        assert all(word in str(error.value) for word in words)
        return
    rope = theirs(kind, json.loads(json.dumps(keys))).rope_parameters
    assert section_of(kind, keys)["rotary_fraction"] == fraction == rope["partial_rotary_factor"]


@pytest.mark.parametrize(
    ("kind", "head"),
    [("llama", "lm_head.weight"), ("qwen2", "lm_head.weight"), ("gpt_neox", "embed_out.weight")],
)
def test_an_output_layer_of_its_own_is_kept(
    tmp_path: Path, kind: str, head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although the config says tied: transformers since version 5 keeps both, so the logits are those of both."""
    from megacode.cli.main import main

    sizes = {
        **SIZES,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
    more = {"use_parallel_residual": False} if kind == "gpt_neox" else {}
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**sizes, **more)
    model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config)
    folder = tmp_path / "hf"
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    embedding = next(weights[name] for name in weights if "embed" in name)

    weights[head] = embedding.clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = Found.open(folder)
    assert found.model.tie_embeddings, "the same matrix twice"
    assert found.notes() == [f"{head} is the embedding once more (tied), left out"]

    weights[head] = embedding + 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = Found.open(folder)
    assert not found.model.tie_embeddings and head in found.notes()[0]
    assert main(["import", str(folder), str(tmp_path / "in")]) == 0
    assert f"note: {head} differs from" in capsys.readouterr().out
    reader = CheckpointReader.open(tmp_path / "in")
    assert torch.equal(reader.tensor(OUTPUT)[:100], weights[head])
    assert torch.equal(reader.tensor(EMBEDDING)[:100], embedding)
    with torch.no_grad():
        loaded = getattr(transformers, f"{CLASSES[kind]}ForCausalLM").from_pretrained(folder)
        assert torch.equal(loaded.get_output_embeddings().weight, weights[head]), (
            "what this is compared with"
        )


def test_import_says_nothing_of_a_model_without_surprises(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**SIZES, "hidden_size": 64, "num_attention_heads": 4})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    found = Found.open(tmp_path / "hf")
    assert found.notes() == [] and not found.model.tie_embeddings
    import_model(found, tmp_path / "in", None)
