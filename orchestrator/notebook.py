"""What a notebook needs: a spec read, a sweep run here, a sweep opened. Functions of ``import fimo``.

Nothing needs Ray: a run's tasks are computed in this process, one after another, under the same contract as on a
cluster, so a sweep begun here can be resumed there and the other way round. Modules that need torch are imported
inside the functions, so that a spec is read without it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fimo.orchestrator.spec.spec import Spec, read_file

if TYPE_CHECKING:
    import pyarrow as pa

    from fimo.orchestrator.sweep.sweep import Sweep
    from fimo.orchestrator.tables.top import Top


def load_spec(path: str | os.PathLike[str]) -> Spec:
    """Read and validate a spec file. Its folder is not remembered: pass ``beside`` to ``run``, or the path itself.

    Raises:
        UsageError: one line: it cannot be read, or what is wrong in it.
    """
    return read_file(Path(path))


def run(
    spec: Spec | str | os.PathLike[str],
    store: str | os.PathLike[str],
    beside: str | os.PathLike[str] | None = None,
    replace: bool = False,
) -> OpenSweep:
    """Compute what is missing of a sweep in this process, then reduce and score it.

    Warns of each thing that a reader of the tables must know: tasks set aside, estimators left out, runs not finite.

    Args:
        spec: a spec, or the path of a spec file.
        store: a directory or ``s3://bucket/prefix``.
        beside: the folder in which the workload's module and the files that the spec names are looked for; default:
            the spec file's folder, or the current one for a ``Spec``.
        replace: let the sweep take the place of one of its name that differs in what its numbers depend on.

    Raises:
        UsageError, WorkloadError: in one line, before anything is written; WorkloadError also if every shard fails.
        StoreError: the store cannot be written or read.
    """
    from fimo.orchestrator.report.ending import complaints
    from fimo.orchestrator.resolve.resolved import resolve
    from fimo.orchestrator.run import driver
    from fimo.orchestrator.run.places import in_process
    from fimo.orchestrator.run.suited import refuse_unsuited
    from fimo.orchestrator.store import open_store
    from fimo.orchestrator.sweep.sweep import Sweep
    from fimo.workers.errors import WorkloadError

    if not isinstance(spec, Spec):
        beside = Path(spec).resolve().parent if beside is None else beside
        spec = load_spec(spec)
    folder = Path.cwd() if beside is None else Path(beside).resolve()
    opened = open_store(os.fspath(store))
    resolved = resolve(spec, folder)
    refuse_unsuited(resolved, Sweep(opened, spec.name))
    report = driver.run(resolved, opened, where=in_process, replace_other=replace)
    if report.outcome.broken:
        raise WorkloadError(f"the sweep was stopped: {report.outcome.stopped}")
    for line in complaints(report):
        warnings.warn(line, stacklevel=2)
    return OpenSweep(Sweep(opened, spec.name))


def open_sweep(uri: str | os.PathLike[str]) -> OpenSweep:
    """A sweep by STORE/NAME; its store is read when something is asked of it.

    Raises:
        UsageError: the URI names no sweep.
    """
    from fimo.orchestrator.sweep import sweep

    return OpenSweep(sweep.open_sweep(os.fspath(uri)))


class OpenSweep:
    """A sweep in its store. Each table is read when it is first asked for, and kept.

    A table is the store's own if that was made from what the store holds now, and is reduced anew otherwise. Those that
    are kept are of one state of the sweep: if it has come further when another is asked for, all are read anew. Every
    method raises UsageError if there is no such sweep, and StoreError if its store cannot be read.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._tables: dict[str, pa.Table] = {}
        self._stamp = ""

    def __repr__(self) -> str:
        return f"OpenSweep({self.uri!r})"

    @property
    def uri(self) -> str:
        """STORE/NAME, as commands take it."""
        return self._sweep.uri

    def status(self) -> dict[str, Any]:
        """How far the sweep is, as `fimo status --json` prints it."""
        from fimo.orchestrator.run.status import sweep_status

        return sweep_status(self._sweep)

    def tables(self, *names: str) -> dict[str, pa.Table]:
        """Tables by their names, of one state of the sweep: in another, removals may have other numbers."""
        from fimo.orchestrator.run.gather import gather
        from fimo.orchestrator.run.written import current, read_table
        from fimo.workers.errors import StoreError

        if not set(names) <= set(self._tables):
            manifest = self._sweep.read_manifest()
            made = current(self._sweep, manifest)
            if made is not None and made["stamp"] != self._stamp:
                self._tables, self._stamp = {}, made["stamp"]
            try:
                # Not all of them: a table of estimates may be large.
                for name in () if made is None else set(names) - set(self._tables):
                    self._tables[name] = read_table(self._sweep, name, made)
            except StoreError:
                made = None
            if made is None:
                gathered = gather(self._sweep, manifest)
                self._tables, self._stamp = gathered.tables, gathered.stamp
        return {name: self._tables[name] for name in names}

    def attribution(self) -> pa.Table:
        """a*: removal, eval, step int32; effect, sem float64; seeds int32."""
        return self._table("attribution")

    def training_only(self) -> pa.Table:
        """What further training on all examples does by itself: eval, step int32; delta, sem float64; seeds int32."""
        return self._table("training_only")

    def estimates(self) -> pa.Table:
        """estimator, params string; removal, eval, step int32 (null: for every amount); value float64."""
        return self._table("estimates")

    def scores(self) -> pa.Table:
        """Agreement of each estimate with the attribution, by metric, adjust, seeds and step."""
        return self._table("scores")

    def reliability(self) -> pa.Table:
        """How far the attribution itself can be trusted, by step."""
        return self._table("reliability")

    def similarity(self) -> pa.Table:
        """Mean cosine between any two estimators."""
        return self._table("similarity")

    def removals(self) -> pa.Table:
        """removal int32, name string, indices list<int32>."""
        return self._table("removals")

    def costs(self) -> pa.Table:
        """Device seconds and peak bytes of each shard and estimator."""
        return self._table("costs")

    def amounts(self) -> pa.Table:
        """How far training on everything has moved the parameters: step int32; distance, sem float64; seeds int32."""
        return self._table("amounts")

    def estimator_notes(self) -> pa.Table:
        """What the estimators say of their values: units, damping, coverage, convergence."""
        return self._table("estimator_notes")

    def ranking(self) -> pa.Table:
        """Every training example ranked for every evaluation example, as `fimo rank` has written it.

        Raises:
            UsageError: it has not, or not of the sweep as it is.
        """
        from fimo.orchestrator.report.opened import ranking

        return ranking(self._sweep)

    def top(self, eval: int = 0, step: int | None = None) -> Top:
        """All effects on an evaluation example at a recorded step (default: the last), the most helpful first.

        Raises:
            UsageError: the sweep has no effect on this example, or none at this step.
        """
        from fimo.orchestrator.tables.top import top

        return top(self.tables("attribution", "training_only", "removals"), eval, step)

    def report(
        self,
        to: str | os.PathLike[str],
        evals: Sequence[int] | None = None,
        step: int | None = None,
        code: str | os.PathLike[str] = ".",
        render: Callable[[Any], Any] | str | None = None,
    ) -> Path:
        """Write the page and the figures of `fimo report` to a folder; returns the page's path.

        Args:
            evals: evaluation examples whose training examples are shown; ``step``: the amount, default the last.
            code: the folder of the workload's module.
            render: shows an example in place of the workload's own ``render``.
        """
        from fimo.orchestrator.report.opened import report_on
        from fimo.orchestrator.resolve.at_hand import Own

        def say(line: str) -> None:
            warnings.warn(line.removeprefix("fimo: "), stacklevel=3)

        written, _ = report_on(self.uri, Path(to), evals, step, own=Own(Path(code)), render=render, say=say)
        return written.page

    def controlled(self, by: str = "mirrored") -> pa.Table:
        """The attribution with a control variate: removal, eval, step, effect, sem, seeds, plain_sem.

        ``by`` is an estimator that trains runs of its own. What it says with the sweep's own seeds, against what it
        says with others, takes its share of the noise out of each seed's effects: unbiased, with ``sem`` where
        ``plain_sem`` was. Whether that is worth the runs is measured in ``docs/cost-of-trust.md``: mostly it is not.

        Raises:
            UsageError: the spec's ``estimators`` lack ``{name: mirrored, own_seeds: true, seeds: k}`` with k the
                sweep's seeds, or ``{name: mirrored, seeds: K}`` with K ≥ k; or one of them is not complete.
        """
        from fimo.orchestrator.run.controlling import controlled

        return controlled(self._sweep, by)

    def _table(self, name: str) -> pa.Table:
        return self.tables(name)[name]
