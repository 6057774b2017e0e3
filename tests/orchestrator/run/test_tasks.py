"""What a task takes from the spec's resources, which never change a result's identity."""

from __future__ import annotations

import pytest

from fimo.orchestrator.resolve import resolved as resolving
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import proving
from fimo.orchestrator.spec.spec import parse
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.stacking.size import Stacks
from tests.support.small_sweep import SPEC, make_spec, run_here


@pytest.mark.parametrize(("shard", "cells"), [(2, 3), (1, 2), ("auto", 101)])
def test_stacks_are_measured_up_to_the_size_that_shards_really_have(beside, monkeypatch, shard, cells):
    asked = []

    def measure(start, largest, _each):
        asked.append(largest)
        return Stacks(2)

    monkeypatch.setattr(proving, "measure_stacks", measure)
    run_here(make_spec(seeds=1, resources={"replicas": "auto", "shard": shard}), beside)
    assert asked == [cells]


def test_shards_that_are_cut_smaller_for_a_dear_model_measure_smaller_stacks(beside, monkeypatch):
    from fimo.orchestrator.run import plan

    asked = []
    monkeypatch.setattr(proving, "measure_stacks", lambda _start, largest, _each: asked.append(largest) or Stacks(2))
    monkeypatch.setattr(plan, "SHARD_WORK", 1)
    run_here(make_spec(seeds=1, resources={"replicas": "auto", "shard": "auto"}), beside)
    assert asked == [plan.SMALLEST + 1]


@pytest.mark.parametrize("replay", [True, False])
def test_replay_is_handed_to_the_start_and_recorded_and_no_part_of_the_digest(beside, monkeypatch, replay):
    given = []
    real = resolving.start_from

    def start_from(*arguments):
        given.append(arguments[-1].replay)
        return real(*arguments)

    monkeypatch.setattr(resolving, "start_from", start_from)
    spec = make_spec(seeds=1, resources={"replay": replay})
    _, store, _ = run_here(spec, beside)
    manifest = resolve(spec, beside).manifest
    assert manifest.digest == resolve(make_spec(), beside).manifest.digest
    sweep = Sweep(store, "flowers")
    assert {sweep.read_part(part.key, manifest).provenance["replay"] for part in sweep.list_parts(manifest.digest)} == {
        replay
    }
    assert set(given) == {replay}


def test_off_is_a_word_of_the_spec_and_other_values_are_refused():
    from fimo.orchestrator.spec.spec import read
    from fimo.workers.errors import UsageError

    text = "{name: x, workload: 'a:b', removals: all, seeds: 1, further_training: {optimizer: {name: sgd}, "
    text += "batch_size: 2, epochs: 1}, resources: {replay: %s}}"
    assert read(text % "off").resources.replay is False
    assert read(text % "on").resources.replay is True
    with pytest.raises(UsageError, match=r"resources\.replay"):
        read(text % "sometimes")
    assert parse({**SPEC, "resources": {}}).resources.replay is True
