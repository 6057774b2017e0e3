"""Random small sweeps, interrupted, damaged, resumed: the bytes of undisturbed ones, and the definition's numbers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fimo.orchestrator.resolve.at_hand import Own
from fimo.orchestrator.resolve.resolved import resolve, resolve_again
from fimo.orchestrator.run import driver as runs
from fimo.orchestrator.run.places import in_process
from fimo.orchestrator.run.rerun import rerun_cells
from fimo.orchestrator.run.results import Receipt
from fimo.orchestrator.spec.spec import Spec
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.parts import Part, encode_part
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.definition import train_cell
from fimo.workers.shard import ShardResult
from tests.support.small_sweep import Heard, make_spec, run_here, table_bytes

SEEDS = (395, 512, 573)
"""Chosen for what they meet, such as a torn part beside a lost one of the same stack; others find what is new."""


def drawn(of: random.Random) -> Spec:
    """A small sweep over groups, of which the last repeats the first, in no order of their names."""
    workload, n = of.choice([("flowers", 23), ("sentences", 17)])
    groups = {f"g{of.randrange(10**6)}": sorted(of.sample(range(n), of.randint(1, 3))) for _ in range(of.randint(2, 4))}
    changes: dict[str, Any] = {
        "workload": f"flowers:{workload}",
        "removals": {"groups": {**groups, "again": next(iter(groups.values()))}},
        "seeds": {"first": of.choice([0, 7]), "count": of.randint(2, 5)},
        "further_training": {
            "optimizer": of.choice([{"name": "sgd", "lr": 0.1, "momentum": 0.9}, {"name": "adamw", "lr": 0.01}]),
            "batch_size": of.choice([4, 5, 6]),
            "removal_mode": of.choice(["drop", "mask", "reweight"]),
            "evaluate": of.choice([{"every_steps": 2}, {"every_epochs": 1}]),
            "clip_norm": of.choice([None, 0.3]),
            "precision": of.choice(["float32", "float64"]),
        },
        "estimators": of.choice([[], ["grad_dot"]]),
        "resources": {
            "replicas": of.choice([1, 3, 64]),
            "shard": of.randint(1, 3),
            "together": of.randint(1, 4),
            "witnesses": of.choice([0, 1]),
            "replay": False,
        },
    }
    return make_spec(**changes)


def damage(of: random.Random, store: MemoryStore) -> None:
    """Some objects lost, others torn, or those of another key."""
    keys = [e.key for kind in ("parts", "witnesses", "estimates") for e in store.list(f"flowers/{kind}/")]
    before = {key: store.get(key) for key in keys}
    for key in of.sample(keys, min(len(keys), of.randint(1, 5))):
        whole = before[key]
        change = of.choice(["delete", "tear", "alter", "swap"])
        if change == "delete":
            store.delete(key)
        elif change == "tear":
            store.put(key, whole[: of.randrange(len(whole))])
        elif change == "alter":
            place = of.randrange(len(whole))
            store.put(key, whole[:place] + bytes([whole[place] ^ 1 << of.randrange(8)]) + whole[place + 1 :])
        else:
            store.put(key, before[of.choice(keys)])


def forged(of: random.Random, part: Part) -> bytes:
    """The part with every digest in order, and one delta of its first removal another in the last bit."""
    deltas = torch.tensor(part.deltas)
    at = (0, of.randrange(deltas.shape[1]), of.randrange(deltas.shape[2]))
    deltas[at] = float(np.nextafter(float(deltas[at]), np.inf))
    at_final = torch.tensor(part.at_final)
    distances = torch.tensor(part.distances)
    result = ShardResult(part.seed, part.steps, deltas, distances, 1, 0.0, 0, part.scale, at_final)
    return encode_part(result, part.removals, part.digest, part.provenance)[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sweep_that_was_stopped_and_damaged_comes_to_the_bytes_of_one_that_was_not(seed: int, beside: Path) -> None:
    of = random.Random(seed)
    spec, own = drawn(of), Own(beside)
    whole, store, _ = run_here(spec, beside)
    expected, disturbed, turns = table_bytes(store), MemoryStore(), iter(["go on"] * of.randint(0, 6))
    stopped, _, _ = run_here(spec, beside, disturbed, should_stop=lambda: None if next(turns, None) else "stopped")
    assert (whole.exit_code, stopped.exit_code in (0, 3)) == (0, True)
    for resumed in (False, True):
        damage(of, disturbed)
        heard = Heard()
        again = resolve_again(Sweep(disturbed, "flowers"), own) if resumed else resolve(spec, beside)
        report = runs.run(again, disturbed, heard.listener(), where=in_process)
        assert report.exit_code == 0
        assert all(isinstance(result, Receipt) and result.written for result in heard.results), "for nothing"
        assert table_bytes(disturbed) == expected
    assert not list(disturbed.list("flowers/claims/"))
    compare_with_the_definition(of, Sweep(disturbed, "flowers"), own)


def compare_with_the_definition(of: random.Random, sweep: Sweep, own: Own) -> None:
    """A cell is the definition's, and the same bits again; one altered bit is found."""
    resolved = resolve_again(sweep, own)
    manifest = resolved.manifest
    listed = of.choice(sweep.list_parts(manifest.digest))
    part, settings = sweep.read_part(listed.key, manifest), manifest.spec.further_training.settings()
    if settings.precision == "float64":
        for row, removal in ((0, part.removals[0].indices), (-2, ())):
            cell = train_cell(resolved.workload, settings, removal, part.seed, state=resolved.state)
            np.testing.assert_allclose(part.deltas[row], cell.deltas.numpy(), rtol=1e-7, atol=1e-11)
    floor = np.zeros(len(part.steps))
    [sound] = rerun_cells(sweep, manifest, [(listed, 0)], floor, own)
    assert (sound.exact, sound.ok) == (True, True)
    sweep.store.put(listed.key, forged(of, part))
    [found] = rerun_cells(sweep, manifest, [(listed, 0)], floor, own)
    assert (found.exact, found.ok) == (True, False)
