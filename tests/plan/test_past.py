"""Every key of a recipe is a fact of a run's past, or may change freely: no key is forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacode.errors import UserError
from megacode.plan import past
from megacode.plan.fingerprint import differences, fingerprint
from megacode.plan.plan import Plan, make_plan
from megacode.recipe.load import load_recipe
from megacode.recipe.schema import all_keys
from tests.good_recipe import GOOD

STEP = 150  # in the second phase
TOKENS = {"python": 1_000_000, "docs": 500_000}
# A recipe in which each key below has an effect.
BASE = (
    "model.kv_heads=2", "model.mup={base_hidden_size: 32}", "data.fim.spm_rate=0.5", "phases.first.fim_rate=0.5",
    "phases.first.batch_size={start: 4, end: 8, increment: 4, over: 50}", "phases.second.steps=90", "phases.second.tokens=null",
    "phases.second.mixture.domains.code.ratio={shape: linear, start: 0.6, end: 0.7, over: 60}",
    "phases.second.mixture.domains.text.sources={docs: {}}",
    "phases.first.mixture.sources.docs={weight: {shape: linear, start: 0.5, end: 0.7, over: 60}}",
    "phases.second.learning_rate={schedule: wsd, peak: 3e-4, warmup: 4, decay_steps: 40, final: 1e-5}",
)  # fmt: skip
FIRST, SECOND = "phases.first.mixture.sources.docs", "phases.second.mixture.domains.text"
# Key -> a change of it (several keys where one alone says nothing). NAME stands for the names in the recipe above.
CHANGES: dict[str, tuple[str, ...]] = {
    "seed": ("seed=8",), "model_seed": ("model_seed=8",), "data_seed": ("data_seed=8",),
    "tokenizer.kind": (), "tokenizer.added_tokens": (), "tokenizer.bos": (), "tokenizer.eod": (),  # tests/run/test_history.py
    "model.layers": ("model.layers=2",),
    "model.hidden_size": ("model.hidden_size=32",),
    "model.heads": ("model.heads=2",),
    "model.kv_heads": ("model.kv_heads=4",),
    "model.head_dim": ("model.head_dim=32",),
    "model.ffn_size": ("model.ffn_size=128",),
    "model.normalization": ("model.normalization=layernorm",),
    "model.norm_epsilon": ("model.norm_epsilon=1e-6",),
    "model.qk_norm": ("model.qk_norm=true",),
    "model.activation": ("model.activation=geglu",),
    "model.linear_bias": ("model.linear_bias=true",),
    "model.qkv_bias": ("model.qkv_bias=true",),
    "model.position_embedding": ("model.position_embedding=none",),
    "model.rotary_base": ("model.rotary_base=20000",),
    "model.rotary_fraction": ("model.rotary_fraction=0.5",),
    "model.rotary_interleaved": ("model.rotary_interleaved=true",),
    "model.rotary_scaling.kind": ("model.rotary_scaling={kind: linear, factor: 2}",),
    "model.rotary_scaling.original_context_length": (
        "model.rotary_scaling={kind: llama3, factor: 2, original_context_length: 64}",
    ),
    "phases.NAME.objective": ("phases.first.objective.next_token=0.5",),
    "phases.NAME.rotary_base": ("phases.first.rotary_base=20000",),
    "phases.NAME.rotary_scaling.kind": ("phases.first.rotary_scaling={kind: linear, factor: 2}",),
    "phases.NAME.rotary_scaling.factor": ("phases.first.rotary_scaling={kind: linear, factor: 4}",),
    "phases.NAME.rotary_scaling.original_context_length": (
        "phases.first.rotary_scaling={kind: yarn, factor: 4, original_context_length: 64}",
    ),
    "model.rotary_scaling.factor": ("model.rotary_scaling={kind: linear, factor: 4}",),
    "model.no_rope_layer_interval": ("model.no_rope_layer_interval=2",),
    "model.sliding_window": ("model.sliding_window=16",),
    "model.sliding_window_pattern": ("model.sliding_window=16", "model.sliding_window_pattern=2"),
    "model.tie_embeddings": ("model.tie_embeddings=true",),
    "model.dropout": ("model.dropout=0.1",),
    "model.attention_dropout": ("model.attention_dropout=0.1",),
    "model.init_std": ("model.init_std=0.01",),
    "model.init_distribution": ("model.init_distribution=truncated_normal",),
    "model.embedding_init_std": ("model.embedding_init_std=0.5",),
    "model.output_init_std": ("model.output_init_std=0.5",),
    "model.softmax_scale": ("model.softmax_scale=0.5",),
    "model.mup.base_hidden_size": ("model.mup.base_hidden_size=64",),
    "model.mup.embedding_scale": ("model.mup.embedding_scale=2",),
    "model.mup.output_alpha": ("model.mup.output_alpha=2",),
    "model.megatron": ("model.megatron.softmax_type=off-by-one",),
    "sources.NAME.domain": (
        "sources.docs.domain=code", "phases.second.mixture.domains.text.sources=null", "sources.more={domain: text, tokens: 1M}",
    ),
    "sources.NAME.window": ("sources.docs.window=256",),
    "sources.NAME.packing": ("sources.docs.packing=best_fit",),
    "sources.NAME.order": ("sources.docs.order=file",),
    "sources.NAME.loss_on": (), "phases.NAME.mixture.weight_by": (),  # tests/data/test_conversations.py
    "phases.NAME.epochs": ("phases.first.steps=null", "phases.first.epochs=3"), "phases.NAME.epochs_of": (),
    "phases.NAME.steps": ("phases.first.steps=99",),
    "phases.NAME.tokens": ("phases.first.steps=null", "phases.first.tokens=50k"),
    "phases.NAME.budget.total": ("phases.first.budget={total: 90k, split: {docs: 1, python: 1}}",),
    "phases.NAME.budget.split.NAME.weight": ("phases.first.budget={split: {both: {weight: 90k, split: {docs: 1, python: 1}}}}",),
    "phases.NAME.budget.competitive.total": ("phases.first.budget={competitive: {total: 90k, m: 0.5, of: docs}}",),
    "phases.NAME.budget.additive.language": ("phases.first.budget={additive: {language: 90k, m: 0.5, of: docs}}",),
    "phases.NAME.batch_size": ("phases.second.batch_size=8",),
    "phases.NAME.batch_size.start": ("phases.first.batch_size.start=6", "phases.first.batch_size.increment=2"),
    "phases.NAME.batch_size.end": ("phases.first.batch_size.end=12",),
    "phases.NAME.batch_size.increment": ("phases.first.batch_size.increment=2",),
    "phases.NAME.batch_size.over": ("phases.first.batch_size.over=60",),
    "phases.NAME.sequence_length": ("phases.second.sequence_length=64",),
    "phases.NAME.fim_rate": ("phases.first.fim_rate=0.4",),
    "phases.NAME.fim_level": ("phases.first.fim_level=document",),
    "phases.NAME.cursor": ("phases.second.cursor=restart",),
    "phases.NAME.optimizer_state": ("phases.second.optimizer_state=fresh",),
    "phases.NAME.reset_at_eod": ("phases.second.reset_at_eod=true",),
    "phases.NAME.within.learning_rate.first": ("phases.first.within={learning_rate: {first: 3, steps: 100}}",),
    "phases.NAME.within.learning_rate.steps": ("phases.first.within={learning_rate: {first: 0, steps: 300}}",),
    "phases.NAME.within.batch_size.first": ("phases.first.within={batch_size: {first: 20, steps: 100}}",),
    "phases.NAME.within.mixture.first": ("phases.first.within={mixture: {first: 20, steps: 120}}",),
    "phases.NAME.learning_rate.schedule": ("phases.second.learning_rate.schedule=cosine",),
    "phases.NAME.learning_rate.peak": ("phases.second.learning_rate.peak=4e-4",),
    "phases.NAME.learning_rate.start": ("phases.second.learning_rate.start=1e-5",),
    "phases.NAME.learning_rate.final": ("phases.second.learning_rate.final=2e-5",),
    "phases.NAME.learning_rate.warmup": ("phases.second.learning_rate.warmup=5",),
    "phases.NAME.learning_rate.decay_steps": ("phases.second.learning_rate.decay_steps=42",),
    "phases.NAME.learning_rate.wsd_decay": ("phases.second.learning_rate.wsd_decay=0.2",),
    "phases.NAME.learning_rate.wsd_shape": ("phases.second.learning_rate.wsd_shape=cosine",),
    "phases.NAME.mixture.sources.NAME.weight": (f"{FIRST}.weight=0.5",),
    "phases.NAME.mixture.sources.NAME.weight.shape": (f"{FIRST}.weight={{shape: cosine, start: 0.5, end: 0.7, over: 60}}",),
    "phases.NAME.mixture.sources.NAME.weight.start": (f"{FIRST}.weight.start=0.4",),
    "phases.NAME.mixture.sources.NAME.weight.end": (f"{FIRST}.weight.end=0.8",),
    "phases.NAME.mixture.sources.NAME.weight.values": (f"{FIRST}.weight={{shape: stepwise, values: [0.1, 0.2]}}",),
    "phases.NAME.mixture.sources.NAME.weight.over": (f"{FIRST}.weight.over=50",),
    "phases.NAME.mixture.sources.NAME.fim_rate": (f"{FIRST}.fim_rate=0.1",),
    "phases.NAME.mixture.sources.NAME.fim_level": (f"{FIRST}.fim_level=document",),
    "phases.NAME.mixture.sources.NAME.subset": (f"{FIRST}.subset=0.0-0.9",),
    "phases.NAME.mixture.sources.NAME.cursor": ("phases.second.mixture.domains.code.sources={python: {cursor: restart}}",),
    "phases.NAME.mixture.online.every": (  # against a phase without blocks; against others: tests/e2e/test_online.py
        "phases.second.mixture.domains.code.ratio=0.6", "phases.second.mixture.online=odm",
    ),
    "phases.NAME.mixture.online.shares": (
        "phases.second.mixture.domains.code.ratio=0.6",
        "phases.second.mixture.online={algorithm: fixed, shares: {code: [0.5], text: [0.5]}}",
    ),
    "phases.NAME.mixture.domains.NAME.ratio": (f"{SECOND}.ratio=0.5",),
    "phases.NAME.mixture.domains.NAME.fim_rate": (f"{SECOND}.fim_rate=0.5",),
    "phases.NAME.mixture.domains.NAME.fim_level": (f"{SECOND}.fim_rate=0.5", f"{SECOND}.fim_level=document"),
    "phases.NAME.mixture.domains.NAME.sources.NAME.weight": (
        "sources.more={domain: text, tokens: 1M}", f"{SECOND}.sources={{docs: 1, more: 1}}",
    ),
    "phases.NAME.mixture.domains.NAME.sources.NAME.fim_rate": (f"{SECOND}.sources={{docs: {{fim_rate: 0.5}}}}",),
    "phases.NAME.mixture.domains.NAME.sources.NAME.subset": (f"{SECOND}.sources={{docs: {{subset: 0.0-0.5}}}}",),
    "phases.NAME.mixture.domains.NAME.sources.NAME.cursor": (f"{SECOND}.sources={{docs: {{cursor: restart}}}}",),
    "phases.NAME.mixture.sources.NAME.loss_weight": (f"{FIRST}.loss_weight=0.5",),
    "phases.NAME.mixture.domains.NAME.sources.NAME.loss_weight": (f"{SECOND}.sources={{docs: {{loss_weight: 0.5}}}}",),
    "phases.NAME.mixture.over_epochs": (
        "phases.second.mixture={sources: {docs: 1, python: {weight: 1, max_epochs: 0.1}}, over_epochs: clip}",
    ),
    "data.packing": ("data.packing=best_fit",),
    "data.reset_at_eod": ("data.reset_at_eod=true",),
    "data.mask_eod_loss": ("data.mask_eod_loss=true",),
    "data.fim.level": ("data.fim.level=document",),
    "data.fim.spm_rate": ("data.fim.spm_rate=0.4",),
    "data.fim.prefix": ("data.fim.prefix=<p>",), "data.fim.middle": ("data.fim.middle=<p>",),
    "data.fim.suffix": ("data.fim.suffix=<p>",), "data.fim.pad": ("data.fim.pad=<p>",),
    "optimizer.beta1": ("optimizer.beta1=0.8",),
    "optimizer.beta2": ("optimizer.beta2=0.99",),
    "optimizer.epsilon": ("optimizer.epsilon=1e-6",),
    "optimizer.weight_decay": ("optimizer.weight_decay=0",),
    "optimizer.clip_grad": ("optimizer.clip_grad=0",),
    "optimizer.loss_denominator": ("optimizer.loss_denominator=positions",),
    "optimizer.ema.decay": ("optimizer.ema=0.9",),
    "optimizer.ema.every": ("optimizer.ema={decay: 0.9, every: 2}",),
    "optimizer.groups": ("optimizer.groups=[{match: '*bias'}]",),
    "optimizer.groups.NAME.match": ("optimizer.groups=[{match: '*'}]",),
    "optimizer.groups.NAME.lr_mult": ("optimizer.groups=[{match: '*', lr_mult: 2}]",),
    "optimizer.groups.NAME.weight_decay_mult": ("optimizer.groups=[{match: '*', weight_decay_mult: 2}]",),
    "optimizer.megatron": ("optimizer.megatron.apply_wd_to_qk_layernorm=true",),
    "precision.compute": ("precision.compute=fp32",),
    "precision.fp8_format": ("precision={compute: fp8}",),
    "precision.fp8_recipe": ("precision={compute: fp8, fp8_recipe: tensorwise}",),
    "precision.fp8_amax_history": ("precision={compute: fp8, fp8_amax_history: 16}",),
    "precision.fp8_params": ("precision={compute: fp8, fp8_params: true}",),
    "precision.bf16_first_layers": ("precision={compute: fp8, fp8_recipe: tensorwise, bf16_first_layers: 1}",),
    "precision.bf16_last_layers": ("precision={compute: fp8, fp8_recipe: tensorwise, bf16_last_layers: 1}",),
    "initialize_from": ("initialize_from=elsewhere",),
    "initialize_new_rows": ("initialize_from=elsewhere", "initialize_new_rows=init"),
}  # fmt: skip
# Said by another key's change: the same class of the schema.
SAME = {
    "phases.NAME.budget.split.NAME.split": "phases.NAME.budget.split.NAME.weight",
    **{
        f"phases.NAME.budget.competitive.{key}": "phases.NAME.budget.competitive.total"
        for key in ("m", "of")
    },
    **{
        f"phases.NAME.budget.additive.{key}": "phases.NAME.budget.additive.language"
        for key in ("m", "of")
    },
    "phases.NAME.within.batch_size.steps": "phases.NAME.within.batch_size.first",
    "phases.NAME.within.mixture.steps": "phases.NAME.within.mixture.first",
    "phases.NAME.mixture.domains.NAME.sources.NAME.fim_level": "phases.NAME.mixture.sources.NAME.fim_level",
}
FREELY = (
    "name=other", "description=other", "parallel.tensor=2", "parallel.micro_batch_size=2", "parallel.pipeline=2",
    "parallel.recompute=full", "parallel.distributed_optimizer=false", "fusion.rope=false", "logging.every=1",
    "checkpoints.every=3",
    "checkpoints.keep_last=7", "evaluation.every=5", "phases.second.checkpoint_every=5", "data.prefetch=0",
    "model.pad_multiple=64", "sources.docs.path=there", "sources.docs.validation=there",
    "model.megatron.attention_backend=flash", "optimizer.megatron.use_precision_aware_optimizer=true",
    "model.kv_heads=2", "model.head_dim=16", "model.ffn_size=192", "model.softmax_scale=0.0625",  # what they are anyhow
)  # fmt: skip
LATER = (
    "phases.+=[{name: third, steps: 5, batch_size: 1, sequence_length: 64, mixture: {sources: {docs: 1}}, "
    "learning_rate: {peak: 1}, rotary_base: 1e6}]",
    "phases.second.steps=200",
    "phases.+=[{name: third, steps: 5, batch_size: 1, sequence_length: 64, mixture: {sources: {docs: 1}}, "
    "learning_rate: {peak: 1}, optimizer_state: fresh}]",
)  # fmt: skip


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return path


def plan_of(path: Path, *overrides: str) -> Plan:
    return make_plan(load_recipe(path, [*BASE, *overrides]), {**TOKENS, "more": 500_000})


def changed(old: Plan, new: Plan) -> list[str]:
    batches = differences(fingerprint(old, STEP), fingerprint(new, STEP))
    return [*batches, *map(str, past.changed_past(old.recipe, new, STEP))]


def leaves() -> list[str]:
    keys = list(dict.fromkeys(all_keys()))
    taken = {"model.megatron", "optimizer.megatron", "phases.NAME.batch_size", "optimizer.groups"}
    ratios = tuple(key for key in keys if key.endswith((".weight", ".ratio")))
    return [
        key
        for key in keys
        if key in taken or key in ratios or not any(k.startswith(key + ".") for k in keys)
    ]


@pytest.mark.parametrize("key", leaves())
def test_every_key_is_a_fact_or_free(key: str, recipe_file: Path) -> None:
    kind = past.kind_of(key.replace("NAME", "*"))
    if kind == "free":
        return
    assert kind, f"{key} has no kind; say in recipe/past.py what a change of it means for a run"
    if key not in CHANGES and ".ratio." in key:
        return  # a schedule, as weights have
    if key not in CHANGES and ".domains.NAME.sources.NAME.weight." in key:
        return
    if key.startswith("phases.NAME.objective."):
        key = "phases.NAME.objective"  # compared as a whole
    overrides = CHANGES[SAME.get(key, key)]
    if overrides:
        assert changed(plan_of(recipe_file), plan_of(recipe_file, *overrides)), (
            f"{key}: a changed past went unnoticed"
        )


@pytest.mark.parametrize("override", FREELY)
def test_what_is_free_changes_nothing_of_the_past(override: str, recipe_file: Path) -> None:
    assert changed(plan_of(recipe_file), plan_of(recipe_file, override)) == []


@pytest.mark.parametrize("override", LATER)
def test_the_future_is_free(override: str, recipe_file: Path) -> None:
    old, new = plan_of(recipe_file), plan_of(recipe_file, override)
    assert changed(old, new) == [] and new.total_steps > old.total_steps


def test_an_objective_that_moves_is_compared_step_by_step(recipe_file: Path) -> None:
    def moving(end: float) -> Plan:
        schedule = f"{{shape: stepwise, values: [1, 0.5, {end}]}}"
        return plan_of(recipe_file, f"phases.first.objective.next_token={schedule}")

    steps = moving(0.5).phases[0].steps
    (change,) = past.changed_past(moving(0.5).recipe, moving(0.25), STEP)
    assert change.key == "phases.first.objective" and f"step {-(-2 * steps // 3) + 1:,}" in str(
        change
    )
    early = steps // 2
    assert not past.changed_past(moving(0.5).recipe, moving(0.25), early)


def test_a_rate_that_a_longer_phase_moves_is_named_with_its_step(recipe_file: Path) -> None:
    decays = (
        "phases.second.learning_rate={schedule: linear, peak: 1e-3, warmup: 0, decay_steps: null}",
    )
    (line,) = changed(
        plan_of(recipe_file, *decays), plan_of(recipe_file, *decays, "phases.second.steps=180")
    )
    assert line.startswith(
        "phases.second.learning_rate: 0.000989 before, 0.0009945 now in step 102"
    )
    assert "decay_steps" in line


def test_keys_that_can_be_accepted(recipe_file: Path) -> None:
    plan = make_plan(load_recipe(recipe_file, ["optimizer.beta2=0.9"]), TOKENS)
    (change,) = past.changed_past(load_recipe(recipe_file), plan, 5)
    assert str(change) == "optimizer.beta2: 0.95 before, 0.9 now"
    assert past.accepts(["optimizer"], change) and past.accepts(["optimizer.beta2"], change)
    assert not past.accepts(["optimizer.beta", "optimizer.beta1", "model"], change)
    assert past.accepts(
        ["phases.first.learning_rate.peak"], past.Change("phases.first.learning_rate", 1, 2)
    )
    past.check_accepted(
        ["optimizer", "model.rotary_base", "phases.first.learning_rate", "tokenizer"]
    )
    past.check_accepted(["model.megatron.softmax_type"])
    for key, said in (
        ("optimiser", "no such key"), ("seed", "decides which data"), ("parallel.tensor", "may change freely"),
        ("phases.first.mixture", "decides which data"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            past.check_accepted([key])
