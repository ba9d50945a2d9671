"""The remote code shipped with `crystalcoder` exports, against a forward pass written here from the published description."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
import torch  # noqa: E402

import megacode.convert.crystalcoder as shipped  # noqa: E402

CONFIG: dict[str, Any] = {
    "model_type": "crystalcoder",
    "architectures": ["CrystalCoderLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_crystalcoder.CrystalCoderConfig",
        "AutoModel": "modeling_crystalcoder.CrystalCoderModel",
        "AutoModelForCausalLM": "modeling_crystalcoder.CrystalCoderLMHeadModel",
    },
    "vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": 50,
    "activation_function": "swiglu", "layer_norm_epsilon": 1e-5, "position_embedding_type": "rotary", "rotary_dim": 6,
    "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22, "mup_width_scale": 0.0625, "mup_scale_qk_dot_by_d": True,
    "scale_attn_weights": True, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True,
    "use_cache": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under the published names; matrices [in, out]."""
    draw = np.random.default_rng(seed)
    width, inner = config["n_embd"], config["n_inner"]
    made = {"transformer.wte.weight": draw.normal(0, 0.3, (config["vocab_size"], width))}
    if config["position_embedding_type"] == "learned":
        made["transformer.wpe.weight"] = draw.normal(0, 0.3, (config["n_positions"], width))
    sizes = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    sizes |= {"mlp.c_fc": (width, inner), "mlp.c_proj": (inner, width)}
    if config["activation_function"] == "swiglu":
        sizes["mlp.c_fc2"] = (width, inner)
    for layer in range(config["n_layer"]):
        for name, size in sizes.items():
            made[f"transformer.h.{layer}.{name}.weight"] = draw.normal(0, 0.3, size)
            made[f"transformer.h.{layer}.{name}.bias"] = draw.normal(0, 0.3, size[1])
        for name in ("ln_1", "ln_2"):
            made[f"transformer.h.{layer}.{name}.weight"] = draw.normal(1, 0.2, width)
            made[f"transformer.h.{layer}.{name}.bias"] = draw.normal(0, 0.2, width)
    made["transformer.ln_f.weight"] = draw.normal(1, 0.2, width)
    made["transformer.ln_f.bias"] = draw.normal(0, 0.2, width)
    if not config["tie_word_embeddings"]:
        made["lm_head.weight"] = draw.normal(0, 0.3, (config["vocab_size"], width))
    return {name: value.astype(np.float32) for name, value in made.items()}


def expected_logits(
    config: dict[str, Any], w: dict[str, np.ndarray], tokens: np.ndarray
) -> np.ndarray:
    """Logits [length, vocab] of one sequence in float64, loop by loop; shares nothing with the shipped code."""
    width, heads = config["n_embd"], config["n_head"]
    d = width // heads
    length = len(tokens)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(
            (centred**2).mean(-1, keepdims=True) + config["layer_norm_epsilon"]
        )
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def rotated(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        for position in range(length):
            for pair in range(config["rotary_dim"] // 2):
                angle = position / 10000 ** (2 * pair / config["rotary_dim"])
                turn = np.exp(1j * angle)
                turned = (x[position, 2 * pair] + 1j * x[position, 2 * pair + 1]) * turn
                x[position, 2 * pair], x[position, 2 * pair + 1] = turned.real, turned.imag
        return x

    x = w["transformer.wte.weight"][tokens].astype(np.float64)
    if config["position_embedding_type"] == "learned":
        x = x + w["transformer.wpe.weight"][:length]
    x = x * config["mup_embeddings_scale"]
    for layer in range(config["n_layer"]):
        name = f"transformer.h.{layer}"
        qkv = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        mixed = np.zeros_like(x)
        for head in range(heads):
            q, k, v = (
                qkv[:, part * width + head * d : part * width + (head + 1) * d] for part in range(3)
            )
            if config["position_embedding_type"] == "rotary":
                q, k = rotated(q), rotated(k)
            for i in range(length):
                scores = (
                    k[: i + 1] @ q[i] / (d if config["mup_scale_qk_dot_by_d"] else math.sqrt(d))
                )
                share = np.exp(scores - scores.max())
                mixed[i, head * d : (head + 1) * d] = (share / share.sum()) @ v[: i + 1]
        x = x + linear(mixed, f"{name}.attn.c_proj")
        normed = norm(x, f"{name}.ln_2")
        inner = linear(normed, f"{name}.mlp.c_fc")
        if config["activation_function"] == "swiglu":
            gate = linear(normed, f"{name}.mlp.c_fc2")
            inner = inner * (gate / (1 + np.exp(-gate)))
        else:
            inner = np.maximum(inner, 0)
        x = x + linear(inner, f"{name}.mlp.c_proj")
    head = w["transformer.wte.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return (
        norm(x, "transformer.ln_f")
        @ head.T
        * config["mup_output_alpha"]
        * config["mup_width_scale"]
    )


def write_model(folder: Path, config: dict[str, Any], w: dict[str, np.ndarray]) -> Path:
    """A Hugging Face folder: config.json, our remote code, weights."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(w, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("configuration_crystalcoder.py", "modeling_crystalcoder.py"):
        shutil.copy(Path(shipped.__file__).with_name(name), folder / name)
    return folder


def load(folder: Path, **keys: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **keys
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), CONFIG, weights(CONFIG))


TOKENS = np.random.default_rng(1).integers(3, 97, 20)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"tie_word_embeddings": False, "mup_scale_qk_dot_by_d": False, "rotary_dim": 12},
        {"position_embedding_type": "learned", "activation_function": "relu", "n_head": 3},
        {"position_embedding_type": "none", "mup_embeddings_scale": 1.0},
    ],
    ids=["published", "untied", "learned", "none"],
)
def test_logits_are_those_of_the_description(
    tmp_path: Path, changed: dict[str, Any], attention: str
) -> None:
    config = CONFIG | changed
    w = weights(config)
    model = load(write_model(tmp_path / "m", config, w), attn_implementation=attention)
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS)[None]).logits[0].numpy()
    expected = expected_logits(config, w, TOKENS)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert (logits.argmax(-1) == expected.argmax(-1)).all()


def test_a_cache_changes_nothing(folder: Path) -> None:
    model, tokens = load(folder), torch.tensor(TOKENS)[None]
    expected = expected_logits(CONFIG, weights(CONFIG), TOKENS)
    with torch.no_grad():
        first = model(tokens[:, :7], use_cache=True)
        several = model(tokens[:, 7:12], past_key_values=first.past_key_values, use_cache=True)
        pieces = [first.logits, several.logits]
        cache = several.past_key_values
        for i in range(12, 20):
            step = model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            pieces.append(step.logits)
    assert np.abs(torch.cat(pieces, 1)[0].numpy() - expected).max() < 1e-4 * np.abs(expected).max()


def greedy(prompt: list[int], count: int) -> list[int]:
    tokens, w = list(prompt), weights(CONFIG)
    for _ in range(count):
        tokens.append(int(expected_logits(CONFIG, w, np.array(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("keys", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generation_with_and_without_cache(folder: Path, keys: dict[str, Any]) -> None:
    model = load(folder)
    prompt = [5, 17, 90, 3]
    if keys.get("cache_implementation") and hasattr(model.generation_config, "disable_compile"):
        keys = keys | {"disable_compile": True}
    written = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 4, dtype=torch.long), max_new_tokens=8, do_sample=False,
        eos_token_id=None, pad_token_id=0, **keys,
    )  # fmt: skip
    assert written[0, 4:].tolist() == greedy(prompt, 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_in_a_batch(folder: Path, attention: str) -> None:
    model = load(folder, attn_implementation=attention)
    prompts = [[5, 17, 90, 3, 44], [60, 8], [33]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    keys = dict(
        attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for written, prompt in zip(
        model.generate(ids, **keys)[:, width:].tolist(), prompts, strict=True
    ):
        assert written == greedy(prompt, 6)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    expected = expected_logits(CONFIG, weights(CONFIG), np.array(prompts[1]))
    assert np.abs(logits[1, -2:].numpy() - expected).max() < 1e-4 * np.abs(expected).max()


def test_beams_and_embeddings_as_the_prompt(folder: Path) -> None:
    model = load(folder)
    ids = torch.tensor([[5, 17, 90, 3]])
    keys = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    keys["attention_mask"] = torch.ones_like(ids)
    beams = model.generate(ids, num_beams=3, **keys)
    again = model.generate(ids, num_beams=3, use_cache=False, **keys)
    assert beams.tolist() == again.tolist()
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **keys)
    assert embedded[0].tolist()[-5:] == greedy([5, 17, 90, 3], 5)


def test_saving_and_loading_again_keeps_every_bit(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    for (name, one), (_, other) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
    w = weights(CONFIG)
    for name, value in model.state_dict().items():
        assert np.array_equal(value.numpy(), w[name.replace("lm_head", "transformer.wte")]), name
    assert again.lm_head.weight.data_ptr() == again.transformer.wte.weight.data_ptr()


def test_published_files_with_mask_buffers_and_a_stored_head_load(tmp_path: Path) -> None:
    """The published index lists causal-mask buffers of each layer, and the tied head once more."""
    w = weights(CONFIG)
    extra = {
        f"transformer.h.{i}.attn.bias": np.tril(np.ones((1, 1, 64, 64), dtype=bool))
        for i in range(3)
    }
    extra |= {
        f"transformer.h.{i}.attn.masked_bias": np.array(-1e4, dtype=np.float32) for i in range(3)
    }
    extra["lm_head.weight"] = w["transformer.wte.weight"].copy()
    model = load(write_model(tmp_path, CONFIG, w | extra))
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS)[None]).logits[0].numpy()
    expected = expected_logits(CONFIG, w, TOKENS)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_training_with_checkpointed_activations_gives_the_same_gradients(folder: Path) -> None:
    tokens = torch.tensor(TOKENS)[None]
    gradients = []
    for checkpointed in (False, True):
        model = load(folder).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        logs = expected_logits(CONFIG, weights(CONFIG), TOKENS)[:-1]
        logs -= np.log(
            np.exp(logs - logs.max(-1, keepdims=True)).sum(-1, keepdims=True)
        ) + logs.max(-1, keepdims=True)
        assert loss.item() == pytest.approx(-logs[np.arange(19), TOKENS[1:]].mean(), rel=1e-4)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-7), name


def test_new_models_start_as_mup_says(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=True, n_embd=256, n_head=4
    )
    config.initializer_range = 0.08
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    layer = model.transformer.h[0]
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.08, rel=0.05)
    assert layer.attn.c_attn.weight.std().item() == pytest.approx(0.08 * 0.25, rel=0.05)
    assert layer.attn.c_proj.weight.std().item() == pytest.approx(
        0.08 * 0.25 / math.sqrt(6), rel=0.05
    )
    assert layer.attn.c_attn.bias.abs().max().item() == 0 and layer.ln_1.weight.min().item() == 1


def test_unknown_shapes_are_refused(tmp_path: Path) -> None:
    config = CONFIG | {"position_embedding_type": "alibi"}
    with pytest.raises(ValueError, match="alibi"):
        load(write_model(tmp_path, config, weights(CONFIG)))
