"""The whole training loop against a bare Megatron-Core loop: same model, same batches, same machine, one run.

    python bench/step.py [--recipe recipes/crystal-tiny.yaml] [--steps 40] [--rounds 3] [--set KEY=VALUE]

The bare side is written below against Megatron-Core alone: GPTModel, DistributedDataParallel, its optimizer and schedule,
batches ready in memory; no metrics, no loader, no checks (on a machine without CUDA it shares the redirection that lets
Megatron-Core run there at all). The other side is `megacode train` as a user runs it: reading and shuffling data, losses by
source, metrics.jsonl, TensorBoard. Sides take turns, each in a fresh process; what counts is the median time of a step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def bare(batches: Path, recipe_json: Path) -> list[float]:
    """Seconds of each step of a loop that calls Megatron-Core only."""
    import os

    import torch

    if not torch.cuda.is_available():
        from megacode.runtime import cpu

        cpu.install()
        cpu.quiet()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    cuda = torch.cuda.is_available()
    m = json.loads(recipe_json.read_text())
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(m["port"])}
    torch.distributed.init_process_group("nccl" if cuda else "gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    if not cuda:
        cpu.apply_to_megatron()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    device = torch.device("cuda" if cuda else "cpu")
    half = m["compute"] != "fp32"
    dtype = torch.bfloat16 if half else torch.float32
    engine = cuda and m["engine"]
    config = TransformerConfig(
        num_layers=m["layers"], hidden_size=m["hidden_size"], num_attention_heads=m["heads"],
        num_query_groups=m["kv_heads"], kv_channels=m["head_dim"], ffn_hidden_size=m["ffn_size"],
        normalization=m["normalization"], gated_linear_unit=m["gated"], activation_func=torch.nn.functional.silu,
        add_bias_linear=m["linear_bias"], hidden_dropout=0.0, attention_dropout=0.0, bf16=half, params_dtype=dtype,
        pipeline_dtype=dtype, attention_softmax_in_fp32=True, use_cpu_initialization=not cuda,
        rotary_interleaved=m["rotary_interleaved"], bias_dropout_fusion=cuda, bias_activation_fusion=cuda,
        apply_rope_fusion=engine, cross_entropy_loss_fusion=engine, cross_entropy_fusion_impl="te" if engine else "native",
        calculate_per_token_loss=True,
    )  # fmt: skip
    spec = (
        get_gpt_layer_with_transformer_engine_spec()
        if engine
        else get_gpt_layer_local_spec(normalization=config.normalization)
    )
    model = GPTModel(
        config, spec, m["vocab"], m["length"], share_embeddings_and_output_weights=m["tied"], position_embedding_type="rope",
        rotary_percent=m["rotary_fraction"],
    ).to(device)  # fmt: skip
    if half:
        model = model.bfloat16()
    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True), model
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=1e-3, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, clip_grad=1.0, bf16=half, params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        [model],
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss

    def forward(iterator, model):  # type: ignore[no-untyped-def]
        window = next(iterator)
        tokens, labels = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        losses = model(tokens, positions, None, labels=labels)
        return losses, lambda output: (
            output.float().sum(),
            torch.tensor(output.numel(), dtype=torch.int, device=device),
            {"loss": output.detach().float().mean()},
        )

    schedule = get_forward_backward_func()
    windows = [torch.from_numpy(w).to(device) for w in np.load(batches)["windows"]]
    micro = m["micro_batch_size"]
    seconds = []
    for window in windows:
        started = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        parts = window.split(micro)
        schedule(
            forward_step_func=forward, data_iterator=iter(parts), model=model, num_microbatches=len(parts),
            seq_length=m["length"], micro_batch_size=micro, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    torch.distributed.destroy_process_group()
    return seconds


def ours(recipe: str, changes: list[str], run: Path) -> list[float]:
    """Seconds of each step of `megacode train`, from its own metrics."""
    options = [part for change in changes for part in ("--set", change)]
    subprocess.run(
        [sys.executable, "-m", "megacode.cli", "train", recipe, "--run", str(run), *options],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["seconds"] for r in records if r["kind"] == "train"]


def prepare(recipe_path: str, changes: list[str], folder: Path) -> None:
    """Write the batches of the recipe's first phase and what the bare side needs to know of the model."""
    from megacode.data.mixture import Mixture
    from megacode.data.source import open_sources, token_counts
    from megacode.data.tokenizer import load_tokenizer
    from megacode.recipe.load import load_recipe
    from megacode.recipe.plan import make_plan
    from megacode.runtime.launch import free_port

    recipe = load_recipe(recipe_path, changes)
    plan = make_plan(recipe, token_counts(recipe))
    mixture = Mixture(plan, open_sources(plan))
    windows = []
    for step in range(plan.phases[0].steps):
        samples = mixture.step(step)
        rows = np.empty((len(samples), plan.phases[0].sequence_length + 1), np.int64)
        for index, (stream, start) in enumerate(zip(samples.stream, samples.start, strict=True)):
            source = mixture.sources[samples.phase.streams[stream].source]
            rows[index] = source.read(np.array([start]), rows.shape[1])[0]
        windows.append(rows)
    np.savez(folder / "batches.npz", windows=np.stack(windows))
    model = recipe.model
    vocab = load_tokenizer(recipe.tokenizer).vocab_size if recipe.tokenizer else model.vocab_size
    (folder / "model.json").write_text(
        json.dumps(
            dict(
                layers=model.layers, hidden_size=model.hidden_size, heads=model.heads, kv_heads=model.resolved_kv_heads,
                head_dim=model.resolved_head_dim, ffn_size=model.resolved_ffn_size, linear_bias=model.linear_bias,
                normalization={"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[model.normalization], gated=model.gated,
                rotary_interleaved=model.rotary_interleaved, rotary_fraction=model.rotary_fraction,
                tied=model.tie_embeddings, compute=recipe.precision.compute, engine=True,
                vocab=-(-vocab // 128) * 128, length=plan.phases[0].sequence_length,
                micro_batch_size=recipe.parallel.micro_batch_size, port=free_port(),
            )
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/crystal-tiny.yaml")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        print(json.dumps(bare(args.bare / "batches.npz", args.bare / "model.json")))
        return

    from rich.console import Console
    from rich.table import Table

    from megacode.recipe.load import load_recipe

    later = [p.name for p in load_recipe(args.recipe, args.overrides).phases[1:]]
    changes = [
        *args.overrides, f"phases.0.steps={args.steps}", *(f"phases.{name}.steps=1" for name in later),
        "phases.0.fim_rate=0", "evaluation.at_phase_end=false", "checkpoints.keep_phase_ends=false", "logging.every=10",
    ]  # fmt: skip
    sides: dict[str, list[float]] = {"bare Megatron-Core": [], "megacode": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(args.recipe, changes, folder)
        for index in range(args.rounds):
            done = subprocess.run(
                [sys.executable, __file__, "--bare", str(folder)], check=True, stdout=subprocess.PIPE, text=True
            )
            sides["bare Megatron-Core"].append(statistics.median(json.loads(done.stdout.splitlines()[-1])[5:]))
            seconds = ours(args.recipe, changes, folder / f"run{index}")[5 : args.steps]
            sides["megacode"].append(statistics.median(seconds))
    base = statistics.median(sides["bare Megatron-Core"])
    table = Table(title=f"{args.recipe}, {args.steps} steps x {args.rounds} rounds, 1 process, {platform.processor() or platform.machine()}")
    for head in ("side", "ms/step (median of rounds)", "rounds", "ratio"):
        table.add_column(head, justify="left" if head == "side" else "right")
    for name, values in sides.items():
        middle = statistics.median(values)
        table.add_row(name, f"{middle * 1e3:.1f}", " ".join(f"{v * 1e3:.1f}" for v in values), f"{middle / base:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
