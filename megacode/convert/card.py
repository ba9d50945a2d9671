"""The model card of an export: what was trained on what, how far, how well, and how to load it.

Everything comes from the checkpoint (its recipe and `megacode.json`) and, where it is at hand, from
the run's folder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from megacode.errors import UserError
from megacode.files import write_text
from megacode.plan.estimate import parameter_count
from megacode.recipe.schema import Recipe
from megacode.report import figures, palette, tables
from megacode.report.drawing import save
from megacode.report.run_data import Run, read_run
from megacode.run.checkpoints import read_info
from megacode.terminal import count
from megacode.version import __version__

_WINDOW = 100
"""Steps whose training losses are averaged."""


def write_card(
    folder: Path, recipe: Recipe, checkpoint: Path, run: Path | None, family: str, name: str = ""
) -> None:
    """Write README.md, and loss.png and mixture.png where the run has metrics, into an export.

    Args:
        folder: the export; whether it holds a tokenizer and remote code is seen from its files.
        checkpoint: the one that was exported; its step bounds what the card tells of the run.
        run: the run's folder; None, or a folder without metrics, leaves training and losses out.
        family: of the export, such as `llama` or `crystalcoder`.
        name: by which the folder will be loaded; default: its own.
    """
    info = read_info(checkpoint)
    step = int(info["step"])
    past = _past(run, step)
    pictures = _pictures(past, folder) if past else []
    tokens = info.get("tokens") or (float(past.at(step, "tokens")) if past else None)
    streams = [stream for phase in past.phases for stream in phase["streams"]] if past else []
    domains = {source.domain for source in recipe.sources.values()}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    text = environment.get_template("card.md.j2").render(
        name=recipe.name,
        description=recipe.description,
        family=family,
        tags=sorted(domains & {"code", "text", "math"}),
        lead=_lead(recipe, info, tokens),
        model=_model_rows(recipe, info),
        phases=tables.phases(past) if past else None,
        current=info.get("phase"),
        progress=_progress(past, step, tokens) if past else "",
        step=f"{step:,}",
        window=min(_WINDOW, len(past.train)) if past else 0,
        validated=f"{past.validations[-1]['step']:,}" if past and past.validations else None,
        losses=_losses(past) if past else [],
        pictures=pictures,
        folder=name or folder.name,
        remote_code=any(folder.glob("modeling_*.py")),
        tokenizer=(folder / "tokenizer.json").is_file(),
        fim=recipe.data.fim if any(stream["fim_rate"] for stream in streams) else None,
        version=__version__,
        seed=recipe.seeds,
        checkpoint=checkpoint.name,
        versions=", ".join(tables.versions(past)) if past else "",
    )
    write_text(folder / "README.md", text)


def _past(run: Path | None, step: int) -> Run | None:
    """The run up to `step` finished steps; None where there is nothing to tell."""
    try:
        return read_run(run, until=step) if run else None
    except UserError:  # a checkpoint that was moved away from its run is still a model
        return None


def _pictures(past: Run, folder: Path) -> list[tuple[str, str]]:
    """Draw what there is to draw; (file name, title)."""
    colours = palette.domain_colours(past.domains)
    drawn = [
        ("loss.png", "Loss by domain over steps", figures.loss_by_domain(past, colours)),
        ("mixture.png", "Share of sequences by domain over steps", figures.mixture(past, colours)),
    ]
    for name, _, figure in drawn:
        if figure is not None:
            save(figure, folder / name)
    return [(name, title) for name, title, figure in drawn if figure is not None]


def _parameters(recipe: Recipe, info: dict[str, Any]) -> int | None:
    """None where nobody says how large the vocabulary is."""
    vocabulary = info.get("vocab_size") or recipe.model.vocab_size
    return parameter_count(recipe.model, vocabulary, _context(recipe)) if vocabulary else None


def _context(recipe: Recipe) -> int:
    return recipe.model.context_length or max(phase.sequence_length for phase in recipe.phases)


def _lead(recipe: Recipe, info: dict[str, Any], tokens: float | None) -> str:
    parameters = _parameters(recipe, info)
    facts = [f"{count(parameters)} parameters"] if parameters else []
    facts.append(f"after {int(info['step']):,} steps")
    if tokens:
        facts.append(f"{count(tokens)} tokens seen")
    lead = f"A causal language model: {', '.join(facts)}."
    if average := info.get("average"):
        steps = ", ".join(f"{step:,}" for step in average["steps"])
        kind = "moving averages (EMA) of the weights" if average["weights"] == "ema" else "weights"
        lead += (
            f" Its weights are the mean of the {kind} after steps {steps}; losses are the run's."
        )
    return lead


def _model_rows(recipe: Recipe, info: dict[str, Any]) -> list[tuple[str, str]]:
    """The table of the model's shape: (name, value)."""
    model, parameters = recipe.model, _parameters(recipe, info)
    vocabulary = info.get("vocab_size") or model.vocab_size
    heads = f"{model.heads}, {model.resolved_head_dim} wide"
    if model.resolved_kv_heads != model.heads:
        heads += f", {model.resolved_kv_heads} for keys and values"
    positions: str = model.position_embedding
    if positions == "rotary":
        rotated = "all" if model.rotary_fraction == 1 else f"{model.rotary_fraction:.0%}"
        pairs = "neighbouring pairs" if model.rotary_interleaved else "halves"
        positions = f"rotary on {rotated} of each head in {pairs}, base {model.rotary_base:,g}"
    biases = "queries, keys and values" if model.qkv_bias else "none"
    norm = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[model.normalization]
    norm += f", epsilon {model.norm_epsilon:g}"
    shared = "shared by input and output"
    rows = [
        ("parameters", f"{parameters:,}" if parameters else "–"),
        ("layers", str(model.layers)),
        ("hidden size", f"{model.hidden_size:,}"),
        ("heads", heads),
        ("feed-forward", f"{model.activation}, {model.resolved_ffn_size:,} wide"),
        ("norm", norm + (", also on queries and keys" if model.qk_norm else "")),
        ("biases", "every linear layer" if model.linear_bias else biases),
        ("positions", positions),
        ("context", f"{_context(recipe):,} tokens"),
        ("vocabulary", f"{vocabulary:,}" if vocabulary else "–"),
        ("embeddings", shared if model.tie_embeddings else "separate for input and output"),
    ]
    if model.mup:
        factors = f"embeddings × {model.embedding_scale:g}, logits × {model.logit_scale:g}"
        rows.append(("muP", f"{factors}, attention scores × {model.resolved_softmax_scale:g}"))
    return rows


def _progress(past: Run, step: int, tokens: float | None) -> str:
    planned = past.plan.get("steps")
    text = f"{step:,}" + (f" of {planned:,}" if planned else "") + " steps"
    whole = sum(phase["tokens"] for phase in past.phases)
    if tokens:
        text += f", {count(tokens)}" + (f" of {count(whole)}" if whole else "") + " tokens"
    read = {stream["source"] for phase in past.phases for stream in phase["streams"]}
    known = past.recipe.sources.items()
    sources = ", ".join(f"{name} ({source.domain})" for name, source in known if name in read)
    return f"{text}. Sources: {sources}."


def _losses(past: Run) -> list[tuple[str, str, str]]:
    """(domain, training loss, validation loss) at the end."""
    train, rows = past.train, []
    valid = past.last_validation()
    for domain in past.domains:
        losses = train.loss_by_domain.get(domain, np.array([np.nan]))[-_WINDOW:]
        weights = train.ratio_by_domain.get(domain, np.ones_like(losses))[-_WINDOW:]
        known = np.isfinite(losses) & (weights > 0)
        mean = float(np.average(losses[known], weights=weights[known])) if known.any() else None
        rows.append((domain, _number(mean), _number(valid.get(domain))))
    return [row for row in rows if row[1:] != ("–", "–")]


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "–"
