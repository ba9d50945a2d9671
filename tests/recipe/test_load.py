"""Reading recipes: the dialect, `extends`, overrides, paths, writing back."""

import pytest

from megacode.errors import UserError
from megacode.recipe.load import dump_recipe, load_recipe
from megacode.recipe.schema import Schedule


def test_a_good_recipe_loads_with_types(write):
    recipe = load_recipe(write())
    assert recipe.phases[0].learning_rate.peak == 1e-3
    assert recipe.phases[1].learning_rate.peak == 3e-4
    assert recipe.phases[1].tokens == 100_000
    assert recipe.sources["docs"].tokens == 500_000


def test_paths_come_back_absolute_from_the_file_they_stand_in(write, tmp_path, good):
    write(good, "base/recipe.yaml")
    child = write(
        "extends: base/recipe.yaml\nsources: {docs: {validation: [held/a, /abs/b]}}\n", "child.yaml"
    )
    recipe = load_recipe(child)
    assert recipe.sources["python"].path == str(tmp_path / "base/data/python")
    assert recipe.sources["docs"].validation == [str(tmp_path / "held/a"), "/abs/b"]
    assert recipe.tokenizer.path == str(tmp_path / "base/tok.model")


def test_the_pack_cache_is_relative_to_the_recipe_too(write, tmp_path, good):
    recipe = load_recipe(
        write(good + "data: {packing: best_fit, pack_cache: ../packs}\n", "sub/recipe.yaml")
    )
    assert (
        recipe.data.pack_cache == str(tmp_path / "packs") and recipe.packing("python") == "best_fit"
    )


def test_an_override_path_is_relative_to_the_working_directory(write, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    path = write()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe(path, ["tokenizer.path=t.model"]).tokenizer.path == str(
        tmp_path / "elsewhere/t.model"
    )


def test_writing_and_reading_give_an_equal_recipe(write, good, tmp_path):
    extra = (
        'description: "1e5"\nmodel: {megatron: {wgrad_deferral_limit: 2, num_layers_in_first_pipeline_stage: null}}\n'
        "phases:\n  second:\n    batch_size: {start: 4, end: 16, increment: 4, over: 20}\n"
        "    mixture: {domains: {code: {shape: stepwise, values: [0.1, 1e-3], over: 10}}}\n"
        "optimizer: {groups: [{match: '*.bias', lr_mult: 1e-5}]}\n"
    )
    write(good, "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\n" + extra, "child.yaml"))
    assert recipe.description == "1e5"
    assert load_recipe(write(dump_recipe(recipe), "again.yaml")) == recipe


def test_extends_merges_mappings_and_replaces_lists(write, good):
    write(good, "base.yaml")
    child = """\
        extends: base.yaml
        name: child
        model: {hidden_size: 128}
        parallel: {ddp: {bucket_size: 1000}}
    """
    recipe = load_recipe(write(child, "child.yaml"))
    assert (recipe.name, recipe.model.hidden_size, recipe.model.layers) == ("child", 128, 4)


def test_a_mapping_can_take_the_place_of_another(write, good):
    write(good, "base.yaml")
    child = """\
        extends: base.yaml
        sources: !replace
          other: {path: data/other}
        phases: {first: {mixture: !replace {sources: {other: 1}}}, second: null}
    """
    recipe = load_recipe(write(child, "child.yaml"))
    assert list(recipe.sources) == ["other"]
    assert list(recipe.phases[0].mixture.sources) == ["other"]
    with pytest.raises(UserError, match="tag '!replace' cannot be read"):
        load_recipe(write(good.replace("phases:\n", "phases: !replace\n", 1), "list.yaml"))


def test_phases_change_by_name_are_dropped_and_added(write, good):
    write(good, "base.yaml")
    child = """\
        extends: base.yaml
        phases:
          first: {steps: 10}
          second: null
          +:
            - {name: third, steps: 5, batch_size: 4, sequence_length: 128,
               mixture: {sources: {docs: 1}}, learning_rate: {peak: 1}}
    """
    recipe = load_recipe(write(child, "child.yaml"))
    assert [(p.name, p.steps) for p in recipe.phases] == [("first", 10), ("third", 5)]
    assert recipe.phases[0].batch_size == 8


def test_short_forms_in_an_added_phase_are_short_forms(write, good):
    write(good, "base.yaml")
    child = """        extends: base.yaml
        phases:
          +:
            - {name: third, steps: 5, batch_size: 4, sequence_length: 128, learning_rate: {peak: 1},
               mixture: {sources: {docs: 0.3, python: 0.7}}}
            - {name: fourth, steps: 5, batch_size: 4, sequence_length: 128, learning_rate: {peak: 1},
               mixture: {domains: {code: 0.4, text: 0.6}}}
    """
    changes = [
        "phases.third.mixture.sources.docs.max_epochs=4",
        "phases.fourth.mixture.domains.code.fim_rate=0.5",
    ]
    third, fourth = load_recipe(write(child, "child.yaml"), changes).phases[-2:]
    docs, code = third.mixture.sources["docs"], fourth.mixture.domains["code"]
    assert (docs.weight, docs.max_epochs) == (0.3, 4)
    assert (code.ratio, code.fim_rate) == (0.4, 0.5)


def test_an_override_may_replace_a_mapping_and_nothing_above_it(write, good):
    changes = [
        "phases.first.mixture.sources=!replace {docs: 1}",
        "model=!replace {layers: 1, hidden_size: 8, heads: 1}",
    ]
    recipe = load_recipe(write(good), changes)
    assert (
        list(recipe.phases[0].mixture.sources) == ["docs"]
        and recipe.phases[0].steps == 100
        and len(recipe.phases) == 2
    )
    assert recipe.model.layers == 1 and recipe.name == "small"


def test_keys_that_exclude_each_other_replace_each_other(write, good):
    write(good, "base.yaml")
    child = """\
        extends: base.yaml
        phases:
          first: {tokens: 1M, mixture: {domains: {code: 1}}}
          second: {steps: 7, mixture: {domains: {code: {shape: linear, start: 0, end: 1}}}}
    """
    first, second = load_recipe(write(child, "child.yaml")).phases
    assert (first.steps, first.tokens, first.mixture.sources) == (None, 1_000_000, None)
    assert (second.steps, second.tokens) == (7, None)
    assert second.mixture.domains["code"].ratio == Schedule(shape="linear", start=0, end=1)
    assert second.mixture.domains["text"].ratio == 0.37


def test_short_forms_merge_with_long_ones(write, good):
    write(good + "precision: fp32\n", "base.yaml")
    child = """\
        extends: base.yaml
        precision: {fp8_format: e4m3}
        phases: {first: {mixture: {sources: {python: {fim_rate: 0.5}, docs: 2}}}}
    """
    recipe = load_recipe(write(child, "child.yaml"))
    assert (recipe.precision.compute, recipe.precision.fp8_format) == ("fp32", "e4m3")
    python = recipe.phases[0].mixture.sources["python"]
    assert (python.weight, python.fim_rate) == (0.3, 0.5)
    assert recipe.phases[0].mixture.sources["docs"].weight == 2


def test_null_takes_a_key_back_to_its_default(write, good):
    write(good + "optimizer: {clip_grad: 5.0}\n", "base.yaml")
    child = "extends: base.yaml\noptimizer: {clip_grad: null}\nphases: {first: {mixture: {sources: {python: null}}}}\n"
    recipe = load_recipe(write(child, "child.yaml"))
    assert recipe.optimizer.clip_grad == 1.0
    assert list(recipe.phases[0].mixture.sources) == ["docs"]
    assert load_recipe(write(good + "optimizer:\n"), ["seed=null"]).seed == 1234


def test_a_source_without_a_value_reads_by_natural_weight(write, good):
    text = good.replace(
        "domains: {code: 0.63, text: 0.37}", "domains: {code: {ratio: 1, sources: [python]}}"
    )
    entry = load_recipe(write(text)).phases[1].mixture.domains["code"].sources["python"]
    assert entry.weight is None


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("phases.first.steps=5", lambda r: r.phases[0].steps, 5),
        ("phases.1.steps=5", lambda r: (r.phases[1].steps, r.phases[1].tokens), (5, None)),
        ("phases.first.learning_rate.peak=3E-4", lambda r: r.phases[0].learning_rate.peak, 3e-4),
        ("phases.first.mixture.sources.docs=2.5", lambda r: r.phases[0].mixture.sources["docs"].weight, 2.5),
        ("precision=fp32", lambda r: r.precision.compute, "fp32"),
        ("model.megatron={wgrad_deferral_limit: 1}", lambda r: r.model.megatron, {"wgrad_deferral_limit": 1}),
        ("optimizer.groups=[{match: a, lr_mult: 2}]", lambda r: r.optimizer.groups[0].lr_mult, 2),
        ("description=a: b = c", None, "expected text, not a mapping"),
        ('description="a: b = c"', lambda r: r.description, "a: b = c"),
        ("phases.+=[{name: x, steps: 1, batch_size: 1, sequence_length: 128, mixture: {sources: {docs: 1}}, "
         "learning_rate: {peak: 1}}]", lambda r: r.phases[2].name, "x"),
    ],
)  # fmt: skip
def test_overrides_reach_every_key(write, override, read, value):
    if read is None:
        with pytest.raises(UserError, match=value):
            load_recipe(write(), [override])
    else:
        assert read(load_recipe(write(), [override])) == value


def test_later_overrides_see_earlier_ones(write):
    recipe = load_recipe(
        write(), ["phases.first.name=one", "phases.one.batch_size=3", "phases.0.steps=5"]
    )
    assert (recipe.phases[0].batch_size, recipe.phases[0].steps) == (3, 5)


def test_names_with_dots_are_found(write, good):
    recipe = load_recipe(write(good.replace("name: first", "name: v1.5")), ["phases.v1.5.steps=3"])
    assert recipe.phases[0].steps == 3


def test_words_stay_words_and_anchors_work(write, good):
    text = good.replace("python: {path", "yes: &a {path").replace("python: 0.3", "yes: 0.3")
    text = text.replace("  docs: {path", "  no: {<<: *a, domain: text}\n  docs: {path")
    recipe = load_recipe(write(text))
    assert list(recipe.sources) == ["yes", "no", "docs"]
    assert recipe.sources["no"].domain == "text" and recipe.sources["no"].tokens == 1_000_000
