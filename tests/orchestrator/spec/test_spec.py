from __future__ import annotations

import contextlib
import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimo.orchestrator.spec.spec import parse, read
from fimo.orchestrator.spec.yaml import read_yaml
from fimo.workers.errors import UsageError
from tests.support.small_sweep import SPEC

DESIGN_EXAMPLE = """
name: concrete
workload: fimo.workers.workloads.tabular:concrete   # module:function
workload_args: {}
final_model: null
removals: {every: 9, count: 100}
seeds: 100
evals: 100
further_training:
  optimizer: {name: sgd, lr: 0.03}
  batch_size: 128
  epochs: 500
  removal_mode: drop
  evaluate: {every_epochs: 1}
  clip_norm: null
  mode: train
  precision: float32
estimators: [grad_dot, grad_cos, {name: cg, damping: [1.0e-3]}]
resources: {gpus: 0, cpus: 1, replicas: auto}
"""


def test_the_contract_s_example_is_a_spec_and_survives_its_canonical_form():
    spec = read(DESIGN_EXAMPLE)
    assert spec.seeds.count == 100
    assert spec.further_training.settings().optimizer.lr == 0.03
    assert parse(spec.canonical()) == spec


def test_defaults_are_the_design_s():
    values = copy.deepcopy(SPEC)
    del values["further_training"]["removal_mode"], values["further_training"]["evaluate"], values["resources"]
    spec = parse(values)
    assert spec.further_training.removal_mode is None, "settled by the model"
    assert spec.further_training.evaluate.every_epochs == 1
    assert spec.resources.replicas == "auto"
    assert spec.evals is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("epochs: 500", "epoch: 500", "unknown key 'further_training.epoch' (did you mean 'epochs'?)"),
        ("lr: 0.03", "lrr: 0.03", "unknown key 'further_training.optimizer.lrr' (did you mean 'lr'?)"),
        ("workload: fimo", "worklod: fimo", "unknown key 'worklod' (did you mean 'workload'?)"),
        ("{every_epochs: 1}", "{every_epoch: 1}", "(did you mean 'every_epochs'?)"),
        ("replicas: auto", "replica: auto", "unknown key 'resources.replica' (did you mean 'replicas'?)"),
        ("name: sgd", "name: sdg", "(did you mean 'sgd'?)"),
        ("name: sgd", "name: adamW", "(did you mean 'adamw'?)"),
        ("name: sgd", "name: SGD", "(did you mean 'sgd'?)"),
        ("workload: fimo.workers.workloads.tabular:concrete", "workload: SST2", "(did you mean 'sst2'?)"),
        ("seeds: 100", "seeds: -1", "'seeds.count'"),
        ("seeds: 100", "seeds: {first: 0}", "give count, or until_reliability"),
        ("seeds: 100", "seeds: {until_reliability: 1.0}", "less than 1"),
        ("seeds: 100", "seeds: {until_relaibility: 0.9}", "(did you mean 'until_reliability'?)"),
        ("seeds: 100", "seeds: {until_reliability: 0.9, min: 9, max: 5}", "between min 9 and max 5"),
        ("seeds: 100", "seeds: {count: 5, max: 9}", "min and max go with until_reliability"),
        ("name: concrete", "name: ../concrete", "'name': use letters"),
        ("workloads.tabular:concrete", "workloads.tabular", "module:function"),
        ("{every: 9, count: 100}", "some", "'removals' must be a mapping"),
        ("{every: 9, count: 100}", "{every: 9, indices: [3]}", "give exactly one of"),
        ("{every: 9, count: 100}", "{fraction: 0.05}", "fraction needs count"),
        ("{every: 9, count: 100}", "{fraction: 5, count: 3}", "less than 1"),
        ("{every: 9, count: 100}", "{fraction: 0, count: 3}", "greater than 0"),
        ("{every: 9, count: 100}", "{fractoin: 0.1, count: 3}", "(did you mean 'fraction'?)"),
        ("{every: 9, count: 100}", "{random: 5, count: 3}", "count goes with every or fraction"),
        ("{every: 9, count: 100}", "{by: label, seed: 3}", "seed goes with random or fraction"),
        ("{every: 9, count: 100}", "{by: label, random: 3}", "give exactly one of"),
        ("{every: 9, count: 100}", "{indices: [-1]}", "greater than or equal to 0"),
        ("{every: 9, count: 100}", "{indices: [true]}", "removals.indices"),
        ("lr: 0.03", "lr: .nan", "finite"),
        ("lr: 0.03", "lr: -1", "greater than 0"),
        ("lr: 0.03", "lr: 0.1, betas: [0.9, 0.9]", "unknown key 'further_training.optimizer.betas'"),
        ("lr: 0.03", "lr: 0.1, nesterov: true", "nesterov needs momentum"),
        ("epochs: 500", "epochs: 500, steps: 3", "valid YAML"),
        ("epochs: 500", "epochs: 500\n  steps: 3", "exactly one of epochs and steps"),
        ("{every_epochs: 1}", "{at_steps: [3], every_steps: 2}", "exactly one of every_epochs"),
        ("seeds: 100", "seeds: 100\nseeds: 3", "given twice"),
        ("seeds: 100", "seeds: &s [*s]", "aliases"),
    ],
)
def test_a_mistake_is_named_in_one_line(old, new, said):
    assert old in DESIGN_EXAMPLE
    with pytest.raises(UsageError) as caught:
        read(DESIGN_EXAMPLE.replace(old, new, 1))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_seeds_that_a_run_adds_by_itself_begin_with_min_and_remember_where_they_stand():
    spec = read(DESIGN_EXAMPLE.replace("seeds: 100", "seeds: {until_reliability: 0.9, min: 6, max: 40, first: 3}"))
    assert (list(spec.seeds), spec.seeds.after) == ([3, 4, 5, 6, 7, 8], 43)
    grown = spec.model_copy(update={"seeds": spec.seeds.model_copy(update={"count": 12})})
    assert parse(grown.canonical()) == grown
    assert len(list(parse(grown.canonical()).seeds)) == 12
    fixed = read(DESIGN_EXAMPLE)
    assert fixed.canonical()["seeds"] == {"first": 0, "count": 100}
    assert fixed.seeds.after is None


@given(st.text(max_size=200))
def test_no_text_makes_the_reader_raise_anything_but_a_usage_error(text):
    with contextlib.suppress(UsageError):
        read(text)


def test_deep_nesting_and_expansion_bombs_are_refused_in_one_line():
    with pytest.raises(UsageError, match=r"nested too deeply|valid YAML"):
        read_yaml("[" * 100_000, "spec")
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"
    with pytest.raises(UsageError, match="aliases"):
        read_yaml(bomb, "spec")


def test_yaml_tags_run_no_code(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(UsageError, match="not valid YAML"):
        read(f"name: !!python/object/apply:os.mkdir ['{target}']")
    assert not target.exists()


def test_scientific_notation_without_a_point_is_a_number():
    assert read_yaml("lr: 3e-2", "spec") == {"lr": 0.03}
