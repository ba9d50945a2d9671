"""Every class of bad recipe: one sentence with the file (and line), the key, and what to do."""

import pytest

from megacode.errors import UserError
from megacode.plan.plan import make_plan
from megacode.recipe.checks import check_files, check_layout
from megacode.recipe.load import load_recipe

HEADS = "heads: 4"
DOCS = "docs: 0.7"
BOTH = "docs: 0.7, python: 0.3"
CODE = "code: 0.63"
BATCH = "batch_size: 8"

# (what to find in the good recipe, what to put there, line, key, words of the sentence)
MISTAKES = {
    "unknown key": (HEADS, "heads: 4\n  layer: 3", 8, "model.layer", ["unknown key", "did you mean `layers`?"]),
    "key of another section": (HEADS, "heads: 4\n  micro_batch_size: 3", 8, "model.micro_batch_size", ["`parallel.micro_"]),
    "unknown section": ("seed: 7", "paralel: {}", 2, "paralel", ["did you mean `parallel`?"]),
    "wrong type": (HEADS, "heads: four", 7, "model.heads", ["a whole number", "'four'", "correct"]),
    "fraction for a whole number": ("layers: 4", "layers: 4.5", 5, "model.layers", ["a whole number", "4.5"]),
    "out of range": ("layers: 4", "layers: 0", 5, "model.layers", ["greater than 0", "not 0"]),
    "word for a boolean": (HEADS, "heads: 4\n  qk_norm: yes", 8, "model.qk_norm", ["true or false", "write true"]),
    "unknown choice": (HEADS, "heads: 4\n  activation: swigul", 8, "model.activation", ["'swiglu'", "'gelu'"]),
    "missing key": ("  layers: 4\n", "", 4, "model.layers", ["is missing", "add `layers:` under model"]),
    "empty key": ("layers: 4\n", "layers:\n", 5, "model.layers", ["is missing"]),
    "no count": (BATCH, "batch_size: many", 14, "phases.first.batch_size", ["a count such as 4000"]),
    "negative batch": (BATCH, "batch_size: -8", 14, "phases.first.batch_size", ["greater than 0", "or a ramp"]),
    "uneven ramp": (
        BATCH, "batch_size: {start: 4, end: 9, increment: 2, over: 5}", 14, "phases.first.batch_size", ["whole increments"],
    ),
    "ramp with a wrong key": (
        BATCH, "batch_size: {start: 4, end: 8, incr: 2, over: 5}", 14, "phases.first.batch_size.incr", ["`increment`?"],
    ),
    "tasks without a tokenizer": (
        "tokenizer: {path: tok.model}", "evaluation: {tasks: [a.yaml]}", 3, "evaluation", ["need `tokenizer:`"],
    ),
    "steps between no tasks": (
        "seed: 7", "evaluation: {tasks_every: 5}", 2, "evaluation.tasks_every", ["has no effect", "name tasks"],
    ),
    "negative weight": (DOCS, "docs: -1", 17, "phases.first.mixture.sources.docs", ["equal to 0", "schedule"]),
    "weights all zero": (BOTH, "docs: 0, python: 0", 16, "phases.first.mixture", ["all weights are zero", "above zero"]),
    "weights beyond numbers": (BOTH, "docs: 1e308, python: 1e308", 16, "phases.first.mixture", ["than a number holds"]),
    "unknown key without a value": ("seed: 7", "sead:", 2, "sead", ["did you mean `seed`?"]),
    "weights all zero in a step": (
        BOTH, "docs: {shape: linear, start: 0, end: 1}, python: {shape: stepwise, values: [0, 1]}", 16,
        "phases.first.mixture", ["at the phase's step 0 all weights are zero", "above zero"],
    ),
    "weights inside a domain all zero": (
        CODE, "code: {ratio: 1, sources: {python: 0}}", 24, "phases.second.mixture.domains.code", ["give one of them more"],
    ),
    "weights for some of a domain's sources": (
        CODE, "code: {ratio: 1, sources: {python: 1, docs: }}", 24, "phases.second.mixture.domains.code.sources",
        ["give all of them one"],
    ),
    "source without weight": (DOCS, "docs: {}", 17, "phases.first.mixture.sources.docs", ["needs a weight"]),
    "incomplete schedule": (
        DOCS, "docs: {shape: linear, start: 1}", 17, "phases.first.mixture.sources.docs", ["takes `start` and `end`"],
    ),
    "unknown schedule": (
        DOCS, "docs: {shape: linaer, start: 1, end: 2}", 17, "phases.first.mixture.sources.docs.shape", ["'linear'"],
    ),
    "wrong subset": (
        DOCS, "docs: {weight: 1, subset: 0.5-0.2}", 17, "phases.first.mixture.sources.docs", ["LOW-HIGH", "0.0-0.1"],
    ),
    "unknown source": (DOCS, "dosc: 0.7", 17, "phases.first.mixture.sources.dosc", ["no source", "did you mean `docs`?"]),
    "domain without sources": (
        CODE, "cod: 0.63", 24, "phases.second.mixture.domains.cod", ["no source has this domain", "`code`?"],
    ),
    "source under another domain": (
        CODE, "code: {ratio: 1, sources: [docs]}", 24, "phases.second.mixture.domains.code.sources.docs",
        ["'text', not 'code'", "change sources.docs.domain"],
    ),
    "both steps and tokens": ("steps: 100", "steps: 100\n    tokens: 5", 12, "phases.first", ["`steps` and `tokens`", "exactly one"]),
    "neither steps nor tokens": ("    steps: 100\n", "", 12, "phases.first", ["no length", "exactly one"]),
    "phase without tokens": ("steps: 100", "steps: 0", 13, "phases.first.steps", ["greater than 0"]),
    "two phases of one name": ("name: second", "name: first", 19, "phases.first.name", ["name each differently"]),
    "bad name": ("name: small", "name: a b", 1, "name", ["letters, digits"]),
    "not a number": ("peak: 1e-3", "peak: .inf", 18, "phases.first.learning_rate.peak", ["a number"]),
    "final above peak": ("peak: 1e-3", "peak: 1e-3, final: 1", 18, "phases.first.learning_rate.final", ["above the peak"]),
    "key without effect": (
        "peak: 1e-3", "peak: 1e-3, schedule: constant, final: 1e-5", 18, "phases.first.learning_rate.final", ["no effect"],
    ),
    "fim without tokenizer": (
        "tokenizer: {path: tok.model}\n", "data: {}\n", 17, "phases.first.mixture.sources.docs.fim_rate", ["`tokenizer:`"],
    ),
    "key given twice": ("seed: 7", "name: again", 2, "name", ["given twice (first in line 1)", "keep one"]),
    "not YAML": ("seed: 7", "seed: 7: 8", 2, "", ["not valid YAML"]),
    "tag": ("seed: 7", "seed: !!python/name:os.system [x]", 2, "", ["tag", "take it out"]),
    "extends nothing": ("seed: 7", "extends: nowhere.yaml", 2, "extends", ["there is no file", "relative to recipe.yaml"]),
    "extends itself": ("seed: 7", "extends: recipe.yaml", 0, "extends", ["in a circle", "take one `extends` out"]),
    "phases by name without extends": ("phases:\n  - name: first\n   ", "phases:\n  first:\n   ", 11, "phases", ["list"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_with_file_line_key_and_remedy(write, good, mistake):
    old, new, line, key, words = MISTAKES[mistake]
    assert old in good
    text = good.replace(old, new, 1)
    overrides = ["phases.first.fim_rate=0.5"] if mistake == "fim without tokenizer" else []
    if mistake == "phases by name without extends":
        text = text[: text.index("  - name: second")]
    path = write(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    first = next(m for m in message.splitlines() if f" {key}: " in m or not key)
    assert first.startswith(f"{path}:{line}: {key}" if line else f"{path}: {key}"), message
    assert all(word in first for word in words), message
    assert "Error" not in message and "Value error" not in message


OVERRIDES = {
    "parallel.tensor=3": ("parallel.tensor", ["does not divide model.heads 4", "use 2 or 4"]),
    "parallel.tensro=3": ("parallel.tensro", ["did you mean `tensor`?"]),
    "parallel.tensor": ("", ["expected KEY=VALUE"]),
    "phases.frist.steps=3": ("phases.frist", ["no such phase", "`first`?"]),
    "parallel.virtual_pipeline=2": ("parallel.virtual_pipeline", ["needs parallel.pipeline"]),
    "parallel.sequence=true": (
        "parallel.sequence",
        ["needs parallel.tensor of 2", "`sequence: false`"],
    ),
    "model.kv_heads=3": ("model.kv_heads", ["does not divide heads 4", "use a divisor"]),
    "model.rotary_fraction=0.2": ("model.rotary_fraction", ["3 of 16", "in pairs"]),
    "model.sliding_window_pattern=2": (
        "model.sliding_window_pattern",
        ["needs model.sliding_window"],
    ),
    "model.no_rope_layer_interval=5": (
        "model.no_rope_layer_interval",
        ["more than model.layers 4"],
    ),
    "model={sliding_window: 16, position_embedding: none, no_rope_layer_interval: 2}": (
        "model.no_rope_layer_interval",
        ["no effect with position_embedding 'none'"],
    ),
    "model.rotary_scaling={kind: yarn, factor: 2}": (
        "model.rotary_scaling",
        ["yarn needs `original_context_length`"],
    ),
    "precision=fp9": ("precision", ["'fp32', 'bf16' or 'fp8'", "correct the override"]),
    "optimizer={ema: 0.9, megatron: {optimizer_cpu_offload: true}}": (
        "optimizer.ema",
        ["is kept on the device"],
    ),
    "optimizer.ema=1": ("optimizer.ema", ["less than 1"]),
    "precision.fp8_params=true": ("precision.fp8_params", ["needs `compute: fp8`"]),
    "checkpoints.every=ten": ("checkpoints.every", ["a count such as 4000"]),
    "initialize_from=[a]": ("initialize_from", ["expected text, not a list"]),
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_mistake_in_an_override_names_the_override(write, override):
    key, words = OVERRIDES[override]
    with pytest.raises(UserError) as caught:
        load_recipe(write(), [override])
    message = str(caught.value)
    assert message.startswith(f"--set {override}: {key}") and all(
        word in message for word in words
    ), message


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["parallel.pipeline=3"], "model.layers", ["multiple of 3"]),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=3"], "model.layers", ["= 6", "multiple of 6"]),
        (["parallel.context=3"], "phases.first.sequence_length", ["2 x parallel.context 3", "multiple of 6"]),
        (["parallel.context=2", "data.reset_at_eod=true"], None, []),
        (["parallel.context=2", "model.megatron.cp_comm_type=a2a", "data.reset_at_eod=true", "phases.second.reset_at_eod=false"],
         "phases.first.reset_at_eod", ["parallel.context 2", "take model.megatron.cp_comm_type out"]),
        (["model.megatron.cp_comm_type=a2a+p2p"], "model.megatron.cp_comm_type", ["use p2p"]),
        (["parallel.tensor=4", "parallel.sequence=true", "phases.first.sequence_length=130"], "phases.first.sequence_length",
         ["sequence parallel", "multiple of 4"]),
        (["model.hidden_size=66"], "model.heads", ["hidden_size 66", "set head_dim"]),
        (["precision=fp8", "model.ffn_size=100", "model.pad_multiple=1"], "model.ffn_size", ["set model.pad_multiple to 16"]),
        (["precision=fp8", "precision.bf16_first_layers=1"], "precision.bf16_first_layers", ["fp8_recipe: delayed"]),
        (["model.kv_heads=2", "model.heads=8", "model.hidden_size=128", "parallel.tensor=4"], None, []),
        (["parallel.recompute={granularity: full, layers: 9}"], "parallel.recompute.layers", ["lower it"]),
        (["phases.second.rotary_scaling={kind: yarn, factor: 2, original_context_length: 32}"], "phases.second.sequence_length",
         ["128 is longer than yarn stretches to", "= 64"]),
        (["model.position_embedding=none", "phases.second.rotary_base=1e6"], "phases.second.rotary_base",
         ["no effect with position_embedding 'none'"]),
        (["model.sliding_window=32", "parallel.context=2"], "model.sliding_window", ["cp_comm_type to a2a"]),
        (["model.context_length=64"], "phases.first.sequence_length", ["longer than model.context_length 64"]),
    ],
)  # fmt: skip
def test_combinations_that_megatron_core_refuses_are_refused_here(write, overrides, key, words):
    path = write()
    if key is None:
        load_recipe(path, overrides)
        return
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert f": {key}: " in message and all(word in message for word in words), message


def test_several_mistakes_are_all_shown(write, good):
    path = write(good.replace(HEADS, "heads: four\n  layer: 3").replace(BATCH, "batch_size: many"))
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "model.heads", "model.layer", "phases.first.batch_size",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content", ["", "- a\n", "hello", "a: &a [*a]\n", "\ufeffname: x\n", "\x00"]
)
def test_hostile_files_are_refused_in_words(write, content):
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load_recipe(write(content))


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no such recipe; check the path"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_aliases_cannot_blow_up_the_reader(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(UserError, match=r"recipe\.yaml:1: name: is missing"):
        load_recipe(write("\n".join(lines)))


@pytest.mark.parametrize(
    ("world", "overrides", "words"),
    [
        (3, ["parallel.tensor=2"], ["3 ranks cannot hold tensor 2", "a multiple of 2"]),
        (3, [], ["phases.first.batch_size: 8 is no multiple", "x 3 data-parallel ranks = 3; use 6", "phases.second.batch"]),
        (2, ["parallel.micro_batch_size=3"], ["= 6; use 6"]),
        (4, ["phases.first.batch_size={start: 6, end: 12, increment: 6, over: 9}"], ["6 (a stair of the ramp)"]),
        (4, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "phases.first.batch_size=6"],
         ["gives 3 micro-batches", "multiple of 4"]),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit(write, world, overrides, words):
    path = write()
    with pytest.raises(UserError) as caught:
        check_layout(load_recipe(path, overrides), world, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and all(word in message for word in words), message


def test_ranks_that_fit(write):
    check_layout(load_recipe(write(), ["parallel.tensor=2", "parallel.pipeline=2"]), 8)


def test_files_that_are_not_there(write, tmp_path):
    path = write()
    with pytest.raises(UserError) as caught:
        given = ["initialize_from=/nowhere/run", "evaluation.tasks=[/nowhere/a.yaml]"]
        check_files(load_recipe(path, given), path)
    message = str(caught.value)
    assert [line.split(": ")[1] for line in message.splitlines()] == [
        "sources.python.path", "sources.docs.path", "tokenizer.path", "initialize_from", "evaluation.tasks",
    ]  # fmt: skip
    assert str(tmp_path / "data/python.idx") in message and "`megacode preprocess`" in message
    (tmp_path / "data").mkdir()
    for name in ("python.idx", "python.bin", "docs-0.idx", "docs-0.bin"):
        (tmp_path / "data" / name).touch()
    (tmp_path / "tok.model").touch()
    check_files(load_recipe(path, [f"sources.docs.path={tmp_path}/data/docs-*"]))


@pytest.mark.parametrize(
    ("overrides", "tokens", "words"),
    [
        ([], 100, ["source python has 100 tokens", "128 + 1", "more data"]),
        (["phases.first.mixture.sources.python.subset=0.0-0.01"], 2000, [".subset", "no whole window", "widen"]),
        (["phases.second.sequence_length=192"], 10**6, ["sources.docs.window", "128 tokens (by default)", "set it to 384"]),
        (["phases.first.mixture.sources.python.max_epochs=2"], 5000,
         ["sources.python.max_epochs", "6.154 times", "more than 2", "at most 32 steps", "lower its weight"]),
    ],
)  # fmt: skip
def test_plans_that_cannot_be(write, overrides, tokens, words):
    path = write()
    with pytest.raises(UserError) as caught:
        make_plan(load_recipe(path, overrides), {"python": tokens, "docs": 10**6}, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and all(word in message for word in words), message
