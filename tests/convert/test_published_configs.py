"""Models as transformers' own classes write them, with the keys of published ones at small sizes, run here with equal logits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megacode.convert.checkpoint_reader import CheckpointReader
from megacode.convert.checkpoint_writer import CheckpointWriter
from megacode.convert.export import ExportSource, Wanted, export
from megacode.convert.importing import Found, import_model
from megacode.errors import UserError
from megacode.recipe.schema import Parallel
from tests.convert.models import VOCAB, save_and_run, tokens_to_try
from tests.processes import run_on

SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
PUBLISHED = {
    # class, keys as published
    "Llama-2-7b": ("Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-5, max_position_embeddings=4096)),
    "Llama-3-8B": ("Llama", dict(num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=8192)),
    "Llama-3.1-8B": ("Llama", dict(num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=131072,
                                   rope_scaling=LLAMA3)),
    "Llama-3.2-1B": ("Llama", dict(num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
                                   rope_scaling=LLAMA3 | {"factor": 32.0})),
    "deepseek-coder-1.3b": ("Llama", dict(rms_norm_eps=1e-6, rope_theta=100000, max_position_embeddings=16384,
                                          rope_scaling={"rope_type": "linear", "factor": 4.0})),
    "SmolLM-135M": ("Llama", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "Mistral-7B-v0.1": ("Mistral", dict(num_key_value_heads=2, sliding_window=4096, max_position_embeddings=32768)),
    "Mistral-7B-v0.3": ("Mistral", dict(num_key_value_heads=2, sliding_window=None, rope_theta=1e6)),
    "Mistral-Nemo": ("Mistral", dict(num_key_value_heads=2, sliding_window=None, head_dim=24, rope_theta=1e6)),
    "Qwen2.5-Coder-0.5B": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e6)),
    "Qwen2.5-7B-1M": ("Qwen2", dict(num_key_value_heads=2, rope_theta=1e6, max_position_embeddings=128, rope_scaling=YARN)),
    "Llama-3.1 from 4k": ("Llama", dict(num_key_value_heads=2, max_position_embeddings=32768,
                                        rope_scaling=LLAMA3 | {"original_max_position_embeddings": 4096})),
    "Qwen3-0.6B": ("Qwen3", dict(num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, rope_theta=1e6)),
    "stablelm-2-1_6b": ("StableLm", dict(num_key_value_heads=4, use_qkv_bias=True, partial_rotary_factor=0.25)),
    "stablelm-3b-4e1t": ("StableLm", dict(num_key_value_heads=4, use_qkv_bias=False, partial_rotary_factor=0.25)),
    "SmolLM3-3B": ("SmolLM3", dict(num_key_value_heads=2, rope_theta=5e6, num_hidden_layers=4, no_rope_layer_interval=4,
                               pad_token_id=None, bos_token_id=1, eos_token_id=2)),
    "starcoder2-3b": ("Starcoder2", dict(num_key_value_heads=2, use_bias=True, rope_theta=999999.4, sliding_window=4096,
                                         max_position_embeddings=16384, hidden_act="gelu_pytorch_tanh")),
    "starcoderbase-1b": ("GPTBigCode", dict(n_inner=256, n_positions=64, multi_query=True,
                                            activation_function="gelu_pytorch_tanh", tie_word_embeddings=True)),
    "tiny_starcoder": ("GPTBigCode", dict(n_positions=64, multi_query=False, activation_function="gelu_pytorch_tanh",
                                          tie_word_embeddings=True)),
    "neox without parallel residual": ("GPTNeoX", dict(use_parallel_residual=False, rotary_pct=0.25, hidden_act="gelu")),
}  # fmt: skip


def build(name: str, folder: Path, **more: object):
    import transformers

    family, keys = PUBLISHED[name]
    config = getattr(transformers, f"{family}Config")(**(SMALL | keys | more))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * (1 if parameter.ndim == 1 else 0.5))
    model.save_pretrained(folder)
    return model


@pytest.mark.slow
def test_published_models_run_here(tmp_path: Path) -> None:
    models, expected = {}, {}
    for name in PUBLISHED:
        hugging_face = build(name, tmp_path / "hf" / name)
        found = Found.open(tmp_path / "hf" / name)
        key = name.replace(" ", "-").replace(",", "")
        import_model(found, tmp_path / "imported" / key, None)
        models[name] = found.model
        with torch.no_grad():
            expected[name] = hugging_face(tokens_to_try()).logits
    (got,) = run_on(1, save_and_run, str(tmp_path / "imported"), models, Parallel(), False)
    for name, theirs in expected.items():
        ours = got[name][..., :VOCAB]
        assert float((ours - theirs).abs().max()) < 1e-4, name
        assert bool((ours.argmax(-1) == theirs.argmax(-1)).all()), name
    for name, length in (("Mistral-7B-v0.1", 32768), ("starcoder2-3b", 16384)):
        assert (models[name].sliding_window, models[name].context_length) == (4096, length)
    assert models["SmolLM3-3B"].no_rope_layer_interval == 4


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("neox without parallel residual", dict(use_parallel_residual=True), "use_parallel_residual is True"),
        ("stablelm-2-1_6b", dict(qk_layernorm=True), "qk_layernorm is True"),
        ("stablelm-2-1_6b", dict(num_key_value_heads=32), "model.kv_heads: 32 does not divide heads 4"),
        ("Llama-2-7b", dict(attention_bias=True), "attention_bias is True and mlp_bias False"),
        (
            "Llama-3-8B",
            dict(rope_scaling=LLAMA3 | {"high_freq_factor": 8.0}),
            "high_freq_factor is 8.0, and only 4.0 can be imported exactly",
        ),
        ("Llama-3-8B", dict(rope_scaling=YARN | {"beta_fast": 64}), "beta_fast is 64, and only 32"),
        ("Llama-3-8B", dict(rope_scaling=YARN | {"attention_factor": 1.0}), "attention_factor is 1.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_told(name, more, words, tmp_path) -> None:
    build(name, tmp_path / "hf", **more)
    with pytest.raises(UserError) as caught:
        Found.open(tmp_path / "hf")
    assert words in str(caught.value) and str(tmp_path / "hf" / "config.json") in str(caught.value)


def test_what_matters_in_training_is_kept(tmp_path: Path) -> None:
    build(
        "starcoder2-3b",
        tmp_path / "hf",
        attention_dropout=0.1,
        residual_dropout=0.05,
        initializer_range=0.018042,
    )
    model = Found.open(tmp_path / "hf").model
    assert (model.attention_dropout, model.dropout, model.init_std) == (0.1, 0.05, 0.018042)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16."""
    folder = tmp_path_factory.mktemp("half") / "hf"
    build("Llama-3-8B", folder, dtype="bfloat16").to(torch.bfloat16).save_pretrained(folder)
    return folder


def changed(half: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy with other weights."""
    shutil.copytree(half, folder)
    weights = {
        name: change(name, tensor) for name, tensor in load_file(half / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_checkpoint_has_the_type_of_most_weights(half: Path, tmp_path: Path) -> None:
    """Of files that keep a few in another one, within a stack of layers too."""
    wide = (
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.mlp.down_proj.weight",
        "0.self_attn.q_proj.weight",
    )
    mixed = changed(
        half, tmp_path / "hf", lambda n, tensor: tensor.float() if n.endswith(wide) else tensor
    )
    assert import_model(Found.open(mixed), tmp_path / "mixed", None).precision.compute == "bf16"
    import_model(Found.open(half), tmp_path / "plain", None)
    got, expected = (
        CheckpointReader.open(tmp_path / "mixed"),
        CheckpointReader.open(tmp_path / "plain"),
    )
    for slot in Found.open(half).slots():
        found = got.tensor(slot.key, slot.layer)
        assert found.dtype == torch.bfloat16 and torch.equal(
            found, expected.tensor(slot.key, slot.layer)
        ), slot.key
    narrow = changed(
        half, tmp_path / "wide", lambda n, tensor: tensor if n in wide else tensor.float()
    )
    assert import_model(Found.open(narrow), tmp_path / "fp32", None).precision.compute == "fp32"


@pytest.mark.parametrize("kind", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_types_that_are_none_of_weights_are_told(
    kind: torch.dtype, half: Path, tmp_path: Path
) -> None:
    folder = changed(
        half, tmp_path / "hf", lambda n, tensor: tensor.to(kind) if "q_proj" in n else tensor
    )
    with pytest.raises(
        UserError,
        match=r"layers.0.self_attn.q_proj.weight is of type .*, and only fp32, bf16 and fp16",
    ):
        import_model(Found.open(folder), tmp_path / "in", None)
    assert not (tmp_path / "in").exists()


def test_numbers_that_do_not_fit_fp16_are_told(half: Path, tmp_path: Path) -> None:
    def large(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return (
            tensor.index_fill(0, torch.tensor([1]), 1e5) if name == "model.norm.weight" else tensor
        )

    import_model(Found.open(changed(half, tmp_path / "hf", large)), tmp_path / "in", None)
    source = ExportSource.open(tmp_path / "in")
    with pytest.raises(
        UserError,
        match=r"model.norm.weight: has numbers beyond 65,504, .*give --dtype bf16 or fp32",
    ):
        export(source, tmp_path / "out", Wanted("llama", "fp16"))
    assert not (tmp_path / "out").exists()
    few = changed(
        half, tmp_path / "few", lambda n, t: large(n, t) if n == "model.norm.weight" else t.half()
    )
    with pytest.raises(UserError, match=r"model.norm.weight has numbers beyond 65,504"):
        import_model(Found.open(few), tmp_path / "other", None)


def test_torchs_own_files_are_read_in_both_formats(half: Path, tmp_path: Path) -> None:
    weights = load_file(half / "model.safetensors")
    import_model(Found.open(half), tmp_path / "expected", None)
    expected = CheckpointReader.open(tmp_path / "expected")
    for zipped in (True, False):
        folder = Path(shutil.copytree(half, tmp_path / f"hf-{zipped}"))
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        import_model(Found.open(folder), tmp_path / f"in-{zipped}", None)
        got = CheckpointReader.open(tmp_path / f"in-{zipped}")
        for slot in Found.open(half).slots():
            assert torch.equal(
                got.tensor(slot.key, slot.layer), expected.tensor(slot.key, slot.layer)
            )
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:1000])
    with pytest.raises(
        UserError, match=r"pytorch_model.bin: cannot be read .*download the file again"
    ):
        Found.open(folder)


def test_a_stack_of_layers_of_different_types_is_read(tmp_path: Path) -> None:
    """As imports wrote it that kept every layer's own type."""
    writer = CheckpointWriter(tmp_path, 2)
    layers = [torch.randn(3, 5, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    for number, tensor in enumerate(layers):
        writer.add("decoder.layers.x", number, tensor)
    writer.finish()
    for number, tensor in enumerate(layers):
        assert torch.equal(
            CheckpointReader.open(tmp_path).tensor("decoder.layers.x", number), tensor
        )
