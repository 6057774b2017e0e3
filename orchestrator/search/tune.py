"""Ray Tune: trials in reused processes, asynchronous halving, and an end in good order. Nothing of value lives in it.

The driver's state is bounded: a trial's result is one number, Tune's loggers and checkpoints are off, and what Tune
writes of itself goes to a temporary folder that is removed. What is found out is in the store before a trial reports.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from fimo.orchestrator.run.pool import gpu_number
from fimo.orchestrator.spec.spec import Resources

Work = Callable[[str, int, int], float]
"""(trial's name, rung, number of its GPU) -> objective. Picklable; runs in a trial's process."""
Note = Callable[[str, int, bool], None]
"""(trial's name, rung, whether it goes on)."""

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The caller's handler notes the signal, and the stopper below ends the search.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "RAY_AIR_NEW_OUTPUT": "0",
}
FAILURES = 3
"""Times that a trial may fail, its worker's death among them."""
OBJECTIVE, RUNG = "objective", "seeds"


class _Trial(tune.Trainable):
    """One trial in a process that outlives it: the work, with the model and the data that it has loaded, is kept."""

    def setup(self, config: dict[str, Any], work: bytes = b"", rungs: Sequence[int] = ()) -> None:
        self._work: Work = pickle.loads(work)
        self._rungs = list(rungs)
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self._name, self._place = str(config["name"]), 0

    def step(self) -> dict[str, Any]:
        rung = self._rungs[self._place]
        self._place += 1
        value = self._work(self._name, rung, gpu_number())
        return {OBJECTIVE: value, RUNG: rung, "done": self._place == len(self._rungs)}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the store has it."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: stored rungs are reported again at once."""


class _Here:
    """Of this process alone: Tune pickles and copies what it is given, to restore what is never restored."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class _Stop(_Here, tune.Stopper):
    def __init__(self, should_stop: Callable[[], str | None]) -> None:
        self._should_stop = should_stop

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._should_stop() is not None


class _Told(_Here, tune.Callback):
    def __init__(self, result: Callable[[str, int], None]) -> None:
        self._result = result

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **_: Any
    ) -> None:
        self._result(str(trial.config["name"]), int(result[RUNG]))


class _Halving(_Here, ASHAScheduler):
    """Asynchronous halving whose decisions are kept: one that was made stands, whatever comes in which order later."""

    def __init__(self, kept: Mapping[tuple[str, int], bool], note: Note, rungs: Sequence[int]) -> None:
        super().__init__(
            time_attr=RUNG,
            metric=OBJECTIVE,
            mode="max",
            max_t=rungs[-1],
            grace_period=rungs[0],
            reduction_factor=2,
        )
        self._kept, self._note = kept, note

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        own = super().on_trial_result(controller, trial, result)
        name, rung = str(trial.config["name"]), int(result[RUNG])
        goes_on = self._kept.get((name, rung))
        if goes_on is None:
            goes_on = own == TrialScheduler.CONTINUE
            self._note(name, rung, goes_on)
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)


def run_trials(
    names: Sequence[str],
    work: Work,
    resources: Resources,
    together: int,
    told: Callable[[str, int], None],
    should_stop: Callable[[], str | None],
    rungs: Sequence[int] = (1,),
    kept: Mapping[tuple[str, int], bool] | None = None,
    note: Note | None = None,
) -> dict[str, str]:
    """Run a trial for each name on the connected Ray, rung by rung.

    Args:
        together: trials at a time.
        told: of each result, as it arrives.
        should_stop: asked now and then; a reason ends the trials, and what they were at is lost.
        rungs: ascending; with more than one, a trial goes on only while it is among the better half of those that
            have come as far, by asynchronous halving.
        kept: decisions of an earlier search that stand; ``note``: is given each new one.

    Returns:
        Name -> the error of a trial that failed for good, in one line.
    """
    os.environ.update(QUIET)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    scheduler = _Halving(kept or {}, note or (lambda *_: None), rungs) if len(rungs) > 1 else FIFOScheduler()
    trainable = tune.with_parameters(_Trial, work=pickle.dumps(work), rungs=list(rungs))
    with tempfile.TemporaryDirectory(prefix="fimo-search-") as folder, _quiet():
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
            param_space={"name": tune.grid_search(list(names))},
            tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=True, max_concurrent_trials=together),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                verbose=0,
                stop=_Stop(should_stop),
                callbacks=[_Told(told)],
                failure_config=tune.FailureConfig(max_failures=FAILURES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        results = tuner.fit()
        ended = [results[place] for place in range(len(results))]
    return {str(one.config["name"]): _line(one.error) for one in ended if one.error is not None and one.config}


def _line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return " ".join((lines[-1] if lines else type(cause).__name__).split())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave stdout to results: Tune prints notes there whatever its verbosity."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
