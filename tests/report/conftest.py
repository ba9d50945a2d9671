"""A made-up run that looks like a real one: Crystal's shape at a small scale, with a ramp, several lengths and sources."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megacode.plan.plan import Plan, make_plan
from megacode.plan.summary import plan_summary
from megacode.recipe.load import dump_recipe, load_recipe
from megacode.run.metrics import MetricsWriter

RECIPE = """
name: {name}
description: Text, then a ramp into code with fill-in-the-middle, then mostly Python
tokenizer: {{path: tokenizer.model, added_tokens: crystal}}
model: {{layers: 24, hidden_size: 2048, heads: 16, kv_heads: 8, vocab_size: 32032}}
sources:
  commoncrawl: {{domain: text, tokens: 6B}}
  wikipedia: {{domain: text, tokens: 300M}}
  books: {{domain: text, tokens: 500M}}
  starcoder: {{domain: code, tokens: 4B, window: 4096}}
  python: {{domain: code, tokens: 90M, window: 4096}}
  proofs: {{domain: math, tokens: 200M, window: 4096}}
phases:
  - name: text
    steps: {steps}
    batch_size: {{start: 64, end: 256, increment: 64, over: 100}}
    sequence_length: 2048
    mixture: {{domains: {{text: 0.95, code: {{ratio: 0.05, sources: [starcoder]}}}}}}
    learning_rate: {{schedule: linear, warmup: 20, peak: 3e-4, final: 2e-4}}
  - name: ramp
    steps: {ramp_steps}
    batch_size: 256
    sequence_length: 2048
    mixture:
      domains:
        code: {{ratio: {{shape: cosine, start: 0.05, end: {ratio}}}, fim_rate: 0.9, sources: {{starcoder: 0.9, python: 0.1}}}}
        text: {{ratio: {{shape: cosine, start: 0.9, end: {rest}}}}}
        math: 0.05
    learning_rate: {{schedule: cosine, warmup: 10, peak: 2e-4, final: 5e-5}}
  - name: python
    steps: {steps}
    batch_size: 128
    sequence_length: 4096
    optimizer_state: fresh
    mixture: {{sources: {{python: 0.75, starcoder: 0.1, proofs: 0.15}}}}
    learning_rate: {{schedule: linear, warmup: 10, peak: 1e-4, final: 1e-5}}
"""

ENVIRONMENT = {
    "megacode": "0.1.0",
    "versions": {
        "torch": "2.6.0",
        "megatron-core": "0.16.1",
        "transformer-engine": "2.12.0",
        "apex": None,
    },
    "host": "gpu-017",
    "cores": 96,
    "device": "NVIDIA H100 80GB HBM3",
    "world_size": 8,
    "started": "2026-02-03T08:15:00+0100",
}


def make_run(
    folder: Path, ratio: float = 0.6, steps: int = 300, done: int | None = None, seed: int = 0
) -> Plan:
    """Write a run folder with `done` finished steps (default: all) of the recipe above, and its plan."""
    folder.mkdir(parents=True)
    path = folder / "recipe.yaml"
    path.write_text(
        RECIPE.format(
            name=folder.name, ratio=ratio, rest=0.95 - ratio, steps=steps, ramp_steps=3 * steps
        )
    )
    recipe = load_recipe(path)
    path.write_text(dump_recipe(recipe))
    plan = make_plan(recipe, {name: source.tokens or 0 for name, source in recipe.sources.items()})
    (folder / "plan.json").write_text(json.dumps(plan_summary(plan)))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "samples.txt").write_text(
        'def read_lines(path):\n    """<b>not bold</b>"""\n    return open(path)\n'
    )
    with MetricsWriter(folder, tensorboard=False) as writer:
        _write_records(
            writer, plan, plan.total_steps if done is None else done, np.random.default_rng(seed)
        )
    return plan


def _write_records(writer: MetricsWriter, plan: Plan, done: int, rng: np.random.Generator) -> None:
    floors = {"text": 2.1, "code": 1.0, "math": 1.6}
    seen = dict.fromkeys(floors, 2e6)
    samples: dict[str, int] = {}
    tokens: dict[str, int] = {}
    writer.event(0, "start", world_size=8)
    for step in range(done):
        phase = plan.phase_at(step)
        if step == phase.first_step:
            writer.event(step + 1, "phase", phase=phase.name)
        counts = phase.counts(step)
        by_source, by_domain, ratio = {}, {}, {}
        for stream, many in zip(phase.streams, counts.tolist(), strict=True):
            seen[stream.domain] += many * phase.sequence_length
            seen["text" if stream.domain == "code" else "code"] += (
                0.1 * many * phase.sequence_length
            )
            samples[stream.source] = samples.get(stream.source, 0) + many
            tokens[stream.source] = tokens.get(stream.source, 0) + many * phase.sequence_length
            ratio[stream.domain] = ratio.get(stream.domain, 0) + many / phase.batch_size(step)
            if many:
                level = floors[stream.domain] + 9 * (seen[stream.domain] / 2e6) ** -0.42
                by_source[stream.source] = (
                    level + 0.15 * (hash_of(stream.source) - 0.5) + rng.normal(0, 0.35 / many**0.5)
                )
                by_domain.setdefault(stream.domain, []).append((by_source[stream.source], many))
        domains = {
            d: sum(x * n for x, n in pairs) / sum(n for _, n in pairs)
            for d, pairs in by_domain.items()
        }
        speed = 412_000 * (1 + rng.normal(0, 0.01)) * (0.35 if step % 211 == 3 else 1)
        batch = phase.batch_size(step)
        seconds = batch * phase.sequence_length / speed
        loss = sum(domains[d] * ratio[d] for d in domains)
        writer.write(
            {
                "kind": "train", "step": step + 1, "phase": phase.name, "loss": float("nan") if step == 400 else loss,
                "grad_norm": (0.4 + 3 * np.exp(-step / 60)) * rng.lognormal(0, 0.15) * (25 if step == 400 else 1),
                "learning_rate": phase.learning_rate(step), "batch_size": batch, "tokens": plan.tokens_before(step + 1),
                "seconds": seconds, "tokens_per_second": speed, "tflops_per_device": speed / 1000, "mfu": speed / 989_000,
                "memory_gb": 61.3, "loss_by_source": by_source, "loss_by_domain": domains, "samples_by_source": samples,
                "tokens_by_source": tokens, "ratio_by_domain": ratio, "batch": "00", **({} if (step + 1) % 25 else {"drift": rng.normal(0, 0.002)}),
            }
        )  # fmt: skip
        if (step + 1) % 100 == 0 or step == phase.last_step:
            valid = {
                n: floors[s.domain] + 9 * (seen[s.domain] / 2e6) ** -0.42
                for n, s in plan.recipe.sources.items()
            }
            writer.write(
                {
                    "kind": "validation", "step": step + 1, "phase": phase.name, "samples": 64,
                    "loss_by_source": {n: v + 0.15 * (hash_of(n) - 0.5) for n, v in valid.items()},
                    "loss_by_domain": {d: floors[d] + 9 * (seen[d] / 2e6) ** -0.42 for d in floors},
                }
            )  # fmt: skip
            writer.event(step + 1, "checkpoint", path=f"step_{step + 1:08d}")


def hash_of(name: str) -> float:
    """A number in [0, 1) that stays the same from process to process."""
    return sum(name.encode()) % 97 / 97


@pytest.fixture(scope="session")
def fake_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ramp-60"
    make_run(folder, steps=100)
    return folder
