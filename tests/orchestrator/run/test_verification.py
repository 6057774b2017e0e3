"""``fimo verify`` finds what is damaged, altered or not reproducible, and says so of nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fimo.orchestrator.report.verified import verification_lines
from fimo.orchestrator.resolve.resolved import Resolved
from fimo.orchestrator.run import verification as verify
from fimo.orchestrator.store import LocalStore
from fimo.orchestrator.sweep import keys, parts
from fimo.orchestrator.sweep.sweep import open_sweep
from fimo.workers.shard import ShardResult
from fimo.workers.stacking import products
from tests.faults import sweeps

CELLS = 15


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Resolved:
    return sweeps.resolved(sweeps.write_project(tmp_path_factory.mktemp("project")))


@pytest.fixture
def store(problem: Resolved, tmp_path: Path) -> LocalStore:
    store = sweeps.folder_store(tmp_path / "store")
    assert sweeps.run_here(problem, store).exit_code == 0
    return store


@pytest.fixture(autouse=True)
def _here(problem: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user stands where the code is."""
    monkeypatch.chdir(problem.manifest.beside)


def rewrite(store: LocalStore, key: str, change: float = 0.0, **provenance: Any) -> None:
    """The part again with its own digests in order, one removal's deltas and some provenance changed."""
    part = parts.decode_part(store.get(key), key)
    deltas = part.deltas.copy()
    deltas[0] += change
    result = ShardResult(part.seed, part.steps, torch.tensor(deltas), torch.tensor(part.distances), 4, 0.0, 0)
    data, _ = parts.encode_part(result, part.removals, part.digest, {**part.provenance, **provenance})
    store.put(key, data)


def test_every_cell_of_a_sound_sweep_trains_to_the_same_bits(store: LocalStore) -> None:
    found = verify.verify(open_sweep(f"{store.uri}/tiny"), rerun=100)
    assert found.exit_code == 0
    assert len(found.reruns) == CELLS
    assert {(r.seed, r.removal) for r in found.reruns} == {(s, r) for s in range(3) for r in range(5)}
    assert all(r.exact and r.identical for r in found.reruns)
    assert (found.parts, found.blocks, found.done) == (6, 1, CELLS)
    [device] = found.devices.values()
    assert device.parts == 6
    expected = [parts.decode_part(store.get(k), k).deltas for k in sweeps.part_keys(store)]
    floor = np.sqrt(np.mean([(d[-1] - d[-2]) ** 2 for d in expected]))
    np.testing.assert_allclose(device.floor, floor, rtol=1e-12)


def test_the_seed_chooses_the_cells(store: LocalStore) -> None:
    chosen = [
        [(r.seed, r.removal) for r in verify.verify(open_sweep(f"{store.uri}/tiny"), 3, seed).reruns]
        for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 3


def test_deltas_that_no_training_gives_are_found_though_every_digest_fits(store: LocalStore) -> None:
    rewrite(store, sweeps.part_keys(store)[0], change=1e-3)
    assert verify.verify(open_sweep(f"{store.uri}/tiny")).exit_code == 0
    found = verify.verify(open_sweep(f"{store.uri}/tiny"), rerun=100)
    assert found.exit_code == 1
    [wrong] = [r for r in found.reruns if not r.ok]
    assert (wrong.seed, wrong.removal) == (0, 0 if cells_of(sweeps.part_keys(store)[0]) == 3 else 3)
    assert any(line.startswith("WRONG: seed 0") for line in verification_lines(found))


def test_another_device_is_held_to_the_noise_floor_and_not_to_the_bits(store: LocalStore) -> None:
    first, second = sweeps.part_keys(store)[:2]
    rewrite(store, first, change=1e-9, device="Other GPU")
    rewrite(store, second, change=1e-2, device="Other GPU")
    found = verify.verify(open_sweep(f"{store.uri}/tiny"), rerun=100)
    other = [r for r in found.reruns if r.device == "Other GPU"]
    assert len(other) == 5
    assert not any(r.exact for r in other)
    assert [r.ok for r in other].count(False) == 1
    near = [r for r in other if not r.identical and r.ok]
    assert len(near) == 1
    assert 0 < near[0].difference < 1
    assert found.exit_code == 1
    assert set(found.devices) == {"Other GPU", next(n for n in found.devices if n != "Other GPU")}


@pytest.mark.parametrize(("kernels", "gains"), [("torch", True), ("oneDNN", False), (None, True)])
def test_a_part_by_other_kernels_is_held_to_the_noise_floor_and_not_to_the_bits(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, kernels: str | None, gains: bool
) -> None:
    """None: a part that does not say by which, as all did before there was a choice."""
    monkeypatch.setattr(products, "gains", lambda: gains)
    for key in sweeps.part_keys(store):
        part = parts.decode_part(store.get(key), key)
        made = {name: value for name, value in part.provenance.items() if name != "products"}
        same = {"products": products.multiplies(torch.device("cpu"))} if part.seed else {}
        told = same or ({} if kernels is None else {"products": kernels})
        result = ShardResult(
            part.seed, part.steps, torch.tensor(part.deltas + 1e-9), torch.tensor(part.distances), 4, 0.0, 0
        )
        store.put(key, parts.encode_part(result, part.removals, part.digest, {**made, **told})[0])
    found = verify.verify(open_sweep(f"{store.uri}/tiny"), rerun=100)
    assert {(r.seed, r.exact, r.ok) for r in found.reruns} == {(0, False, True), (1, True, False), (2, True, False)}


def test_drift_between_devices_is_reported(store: LocalStore) -> None:
    key = sweeps.part_keys(store)[0]
    part = parts.decode_part(store.get(key), key)
    deltas = part.deltas.copy()
    deltas[-2] += 0.25
    result = ShardResult(part.seed, part.steps, torch.tensor(deltas), torch.tensor(part.distances), 4, 0.0, 0)
    store.put(key, parts.encode_part(result, part.removals, part.digest, {**part.provenance, "device": "Other GPU"})[0])
    found = verify.verify(open_sweep(f"{store.uri}/tiny"))
    np.testing.assert_allclose([d.drift for d in found.devices.values()], 0.25)


@pytest.mark.parametrize("folder", ["parts", "estimates"])
def test_a_torn_object_is_named(store: LocalStore, folder: str) -> None:
    key = next(e.key for e in store.list(f"tiny/{folder}/"))
    store.put(key, store.get(key)[:-20])
    found = verify.verify(open_sweep(f"{store.uri}/tiny"))
    assert found.exit_code == 1
    [line] = found.bad
    assert key in line
    assert found.done == (CELLS if folder == "estimates" else CELLS - cells_of(key))


def cells_of(key: str) -> int:
    """The parts of a seed hold its first 3 removals and its last 2."""
    first = keys.set_hash([parts.NamedRemoval(n, str(4 * n), (4 * n,)) for n in range(3)])
    return 3 if first in key else 2


def test_an_incomplete_sweep_exits_3(store: LocalStore) -> None:
    store.delete(sweeps.part_keys(store)[0])
    found = verify.verify(open_sweep(f"{store.uri}/tiny"))
    assert found.exit_code == 3
    assert found.done < CELLS
    json.dumps(found.json())
