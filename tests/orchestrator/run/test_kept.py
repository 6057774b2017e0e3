"""One Ray for a whole command: started when a task comes, not once a round, and ended however the command ends."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from fimo.orchestrator.resolve.resolved import Resolved, resolve
from fimo.orchestrator.run import driver, kept, pool
from fimo.orchestrator.run.driver import Report
from fimo.orchestrator.run.places import LocalPool
from fimo.orchestrator.run.tasks import run_task
from fimo.orchestrator.run.weighing import weigh
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from tests.support.small_sweep import Heard, make_spec, run_here, table_bytes

QUICK: dict[str, Any] = {"estimators": ["grad_dot"], "resources": {"replay": False}}
GROWING = {"min": 2, "max": 8, "until_reliability": 0.9999}


class Here(LocalPool):
    """Tasks in this process, under the pool of Ray's own contract."""

    gave_up = False

    def __init__(self, sweep: Sweep, manifest: Manifest, final_model: bytes | None, see: object) -> None:
        super().__init__(lambda task: run_task(sweep, manifest, final_model, task))

    def close(self) -> None:
        return None


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done with the connection, in order."""
    seen: list[str] = []

    class Cluster(contextlib.AbstractContextManager[None]):
        """No generator, which Python would end when nobody holds it."""

        def __init__(self, address: str | None, code: Path | None = None) -> None:
            seen.append("connected")

        def __exit__(self, *error: object) -> None:
            seen.append("closed")

    monkeypatch.setattr(kept, "cluster", Cluster)
    monkeypatch.setattr(kept, "slots", lambda resources: 1)
    monkeypatch.setattr(pool, "RayPool", Here)
    gather = driver.gather
    monkeypatch.setattr(driver, "gather", lambda *given: seen.append("gathered") or gather(*given))
    return seen


def run(resolved: Resolved, store: MemoryStore, **options: Any) -> Report:
    return driver.run(resolved, store, Heard().listener(), **options)


def test_a_run_of_many_rounds_connects_once_and_one_with_nothing_to_do_never(beside: Path, turns: list[str]) -> None:
    spec, store, started = make_spec(seeds=GROWING, **QUICK), MemoryStore(), list[int]()
    resolved = resolve(spec, beside)
    listener = driver.Listener(lambda plan, tasks: started.append(tasks), lambda task, result: None, lambda line: None)
    report = driver.run(resolved, store, listener)
    assert report.exit_code == 0
    # Rounds of seeds, and one of estimates.
    assert len(started) >= 3
    assert turns == ["connected", "gathered", "closed"]
    again = run(resolved, store)
    assert again.exit_code == 0
    assert turns == ["connected", "gathered", "closed", "gathered"]
    _, plain, _ = run_here(spec, beside)
    assert table_bytes(store) == table_bytes(plain)


def test_cells_at_several_removal_weights_share_a_connection(beside: Path, turns: list[str]) -> None:
    resolved, store = (
        resolve(make_spec(seeds=2, further_training={"removal_mode": "reweight"}, **QUICK), beside),
        MemoryStore(),
    )
    run(resolved, store)
    turns.clear()
    with pool.on_ray(None) as where:
        weighed = weigh(resolved, Sweep(store, "flowers"), where, Heard().listener(), lambda: None)
    assert weighed.trained > 0
    assert turns == ["connected", "closed"]


def test_what_was_given_up_has_ended_before_anything_is_gathered(
    beside: Path, turns: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is being killed may still commit: tables would then be of other parts than their stamp."""
    monkeypatch.setattr(Here, "gave_up", True)
    run(resolve(make_spec(**QUICK), beside), MemoryStore(), should_stop=lambda: "stopped by SIGTERM")
    assert turns == ["connected", "closed", "gathered"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_middle_leaves_no_ray_behind(
    beside: Path, turns: list[str], error: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise error

    quiet = Heard().listener()
    listener = driver.Listener(quiet.start, fail, quiet.say)
    with pytest.raises(error):
        driver.run(resolve(make_spec(**QUICK), beside), MemoryStore(), listener)
    assert turns == ["connected", "closed"]
