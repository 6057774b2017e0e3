"""What a plan says before anything is spent: what does not apply, what is unstable, what everything takes."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from fimo import estimators
from fimo.orchestrator.commands.plan import _plan_json, _planned, _unused
from fimo.orchestrator.report.planned import plan_lines, short
from fimo.orchestrator.resolve.again import SecondLoad
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import budget, timing
from fimo.orchestrator.run import suited as suiting
from fimo.orchestrator.run.measure import Measured, measure, measured_json
from fimo.orchestrator.run.owed import current_plan
from fimo.orchestrator.run.proving import Proven
from fimo.orchestrator.run.suited import judged, refuse_unsuited
from fimo.orchestrator.run.timing import Shards, extrapolated, part_of, parts_of
from fimo.orchestrator.run.work import EstimateTask, Shard, WitnessTask
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.amounts import BASELINE
from fimo.workers.errors import UsageError, WorkloadError
from fimo.workers.stacking.pace import Pace, pace
from tests.support.small_sweep import make_spec, run_here

NOTHING = Sweep(MemoryStore(), "flowers")

UNSTABLE = """
import dataclasses
import torch
import flowers as plain

def data():
    of = plain.flowers()
    noise = torch.empty(1).uniform_(generator=torch.Generator().manual_seed(torch.seed() % 2**31))
    x = {**of.train, "features": of.train["features"] + noise}
    return dataclasses.replace(of, train=x)

def model():
    of = plain.flowers()
    torch.seed()
    for p in of.model.parameters():
        torch.nn.init.normal_(p)
    return of

WORDS = sorted({"setosa", "versicolor", "virginica", "other"}, key=hash)

def order():
    of = plain.flowers()
    moved = of.evals["features"] + WORDS.index("setosa") + 10 * WORDS.index("other")
    return dataclasses.replace(of, evals={**of.evals, "features": moved})
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("data", "the training examples"),
        ("model", "the final model's parameters or buffers"),
        ("flowers", None),
    ],
)
def test_a_workload_that_is_not_deterministic_is_named_by_its_part(beside, function, said):
    (beside / "unstable.py").write_text(UNSTABLE)
    spec = make_spec(workload="flowers:flowers" if said is None else f"unstable:{function}")
    again = SecondLoad(spec, beside)
    manifest = resolve(spec, beside).manifest
    if said is None:
        again.check(manifest)
        assert again.seconds > 0
        return
    with pytest.raises(WorkloadError) as error:
        again.check(manifest)
    assert f"loaded twice, {said} came out otherwise" in str(error.value)
    assert "code" not in str(error.value).split("otherwise")[0]


@pytest.mark.long
def test_what_hangs_on_the_order_of_a_set_is_found_in_another_process(beside, monkeypatch):
    (beside / "unstable.py").write_text(UNSTABLE)
    spec = make_spec(workload="unstable:order")
    manifest = resolve(spec, beside).manifest
    said = set()
    for seed in range(1, 6):
        monkeypatch.setenv("PYTHONHASHSEED", str(seed))
        try:
            SecondLoad(spec, beside).check(manifest)
        except WorkloadError as error:
            said.add(str(error).split(" came out")[0])
    assert said == {"the workload is not deterministic: loaded twice, the evaluation examples"}


class Twice:
    """Stands for the second load of a plan."""

    seconds, differs = 0.0, False

    def __init__(self, *_: object) -> None:
        self.ended = False

    def check(self, _: object) -> None:
        self.ended = True
        if self.differs:
            raise WorkloadError("loaded twice, it differs")

    def stop(self) -> None:
        self.ended = True


def test_a_plan_tells_first_what_differs_between_two_loads_and_then_what_came_of_it(beside, monkeypatch):
    monkeypatch.setattr("fimo.orchestrator.resolve.again.SecondLoad", Twice)
    monkeypatch.setattr(suiting, "_held_against", lambda *_: {}["nothing"])
    with pytest.raises(KeyError):
        _planned(make_spec(estimators=["grad_dot"]), beside, None, False, False)
    monkeypatch.setattr(Twice, "differs", True)
    for store in (None, str(beside / "flowers.py")):
        with pytest.raises(WorkloadError, match="loaded twice, it differs"):
            _planned(make_spec(estimators=["grad_dot"]), beside, store, False, False)


def test_a_plan_looks_at_the_free_memory_when_the_second_load_has_given_its_own_back(beside, monkeypatch):
    loads: list[Twice] = []

    class Noted(Twice):
        def __init__(self, *_: object) -> None:
            super().__init__()
            loads.append(self)

    monkeypatch.setattr("fimo.orchestrator.resolve.again.SecondLoad", Noted)
    monkeypatch.setattr(budget, "_free_bytes", lambda _: 2.0**40 if loads[-1].ended else 0.0)
    assert _planned(make_spec(estimators=["grad_dot"]), beside, None, False, False)["too_large"] == {}


def test_named_estimators_that_do_not_apply_are_told_before_anything_runs(beside, monkeypatch):
    adam = {"optimizer": {"name": "adamw", "lr": 0.01}}
    spec = make_spec(
        further_training=adam, estimators=["grad_dot", "ekfac_matched", {"name": "unrolled", "last_step": 1}]
    )
    resolved = resolve(spec, beside)
    assert [name for name, _ in judged(resolved).unsuited] == ["ekfac_matched", "unrolled"]
    with pytest.raises(UsageError, match=r"estimator ekfac_matched does not apply \(and 1 more\): follows SGD alone"):
        refuse_unsuited(resolved, NOTHING)
    suited = make_spec(further_training=adam, estimators=["grad_dot"])
    assert judged(resolve(suited, beside)).unsuited == {}
    # What a store has of one estimator is no word on the others; of all, nothing is asked once more.
    _, store, _ = run_here(suited, beside, shards=False)
    with pytest.raises(UsageError, match="ekfac_matched does not apply"):
        refuse_unsuited(resolved, Sweep(store, "flowers"))
    monkeypatch.setattr(suiting, "judged", lambda *_: pytest.fail("was held against the model again"))
    refuse_unsuited(resolve(suited, beside), Sweep(store, "flowers"))


def test_what_does_not_fit_in_memory_is_told_and_not_run(beside, monkeypatch):
    monkeypatch.setattr(budget, "_free_bytes", lambda device: 2.0**20)
    resolved = resolve(make_spec(estimators=["grad_dot"]), beside)
    [why] = judged(resolved).too_large.values()
    assert why.startswith("too large: it holds about ")
    refuse_unsuited(resolved, NOTHING)  # tried all the same, since it is named
    on_gpus = resolve(make_spec(estimators=["grad_dot"], resources={"gpus": 1}), beside)
    if not torch.cuda.is_available():
        assert not judged(on_gpus).too_large, "the memory of a GPU is not known here"
    monkeypatch.setattr(type(estimators.parse("grad_dot")[0]), "estimate", lambda self, problem: pytest.fail("was run"))
    measured = measure(resolved, current_plan(resolved.manifest, None))
    assert measured.by_estimator()["grad_dot", '{"preconditioner":null}'] > 0


NORMED = """
import dataclasses
import torch
from torch import nn
import flowers as plain

def norm():
    torch.manual_seed(0)
    width = plain.flowers().train["features"].shape[1]
    model = nn.Sequential(nn.Linear(width, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    return dataclasses.replace(plain.flowers(), model=model)

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gru, self.head = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.gru(x[..., None])[0][:, -1])

def gru():
    return dataclasses.replace(plain.flowers(), model=Tagger())
"""


def test_an_estimator_that_cannot_follow_batch_norm_is_told_before_the_cells_are_trained(beside):
    (beside / "normed.py").write_text(NORMED)
    mask = {"removal_mode": "mask"}
    resolved = resolve(make_spec(workload="normed:norm", further_training=mask, estimators=["unrolled"]), beside)
    with pytest.raises(UsageError, match=r"estimator unrolled does not apply: .*batch norm\); set mode: eval"):
        refuse_unsuited(resolved, NOTHING)
    manifest = resolve(make_spec(workload="normed:norm", further_training=mask, estimators=None), beside).manifest
    assert "unrolled" not in {name for name, _ in manifest.estimators}
    frozen = make_spec(workload="normed:norm", further_training={**mask, "mode": "eval"}, estimators=["unrolled"])
    refuse_unsuited(resolve(frozen, beside), NOTHING)


def test_a_model_that_cannot_be_stacked_is_timed_one_cell_at_a_time(beside, monkeypatch):
    """torch has no batching rule for a GRU on a CPU; a run then trains one at a time, and a plan must not fail."""
    (beside / "normed.py").write_text(NORMED)
    resources = {"replicas": "auto", "proof": False}
    resolved = resolve(make_spec(workload="normed:gru", resources=resources, estimators=[]), beside)
    plan = current_plan(resolved.manifest, None)
    measured = measure(resolved, plan)
    assert len(measured.tasks) == len(plan.shards)
    assert all(seconds > 0 for _, seconds in measured.tasks)
    # Of a stack that is too large, or cannot be, the smaller ones count that are trained in its place.
    start = resolved.start(torch.device("cpu"))
    for error, tried, step in (("no rule", [5, 1], 5.0), ("out of memory", [5, 2], 6.0)):
        sizes: list[int] = []
        monkeypatch.setattr("fimo.orchestrator.run.timing.pace", partial(_refusing, sizes, error, 3))
        found = Shards(Proven(start, 5, {}), 0)._pace(start, [BASELINE] * 5)
        assert (sizes, found.step) == (tried, step)
    monkeypatch.setattr("fimo.orchestrator.run.timing.pace", partial(_refusing, [], "no model", 0))
    with pytest.raises(RuntimeError, match="no model"):
        Shards(Proven(start, 5, {}), 0)._pace(start, [BASELINE])


def _refusing(sizes, error, most, start, lanes, seed, budget_s):
    sizes.append(len(lanes))
    if len(lanes) > most:
        raise RuntimeError(error)
    return Pace(float(len(lanes)), 0.0, 0.5)


def test_why_cells_in_the_store_are_not_used(beside):
    _, store, _ = run_here(make_spec(), beside)
    changed = resolve(make_spec(evals=3, further_training={"batch_size": 4}), beside)
    unused = _unused(changed, Sweep(store, "flowers"))
    assert unused["cells"] == 20
    assert unused["changed"] == [
        "the number of evaluation examples (7, now 3)",
        "further_training.batch_size (5, now 4)",
    ]
    assert _unused(resolve(make_spec(seeds=9), beside), Sweep(store, "flowers")) == {}
    assert _unused(changed, Sweep(MemoryStore(), "flowers")) == {}


@pytest.mark.usefixtures("proven")
def test_every_missing_task_is_timed_and_nothing_that_is_there(beside):
    spec = make_spec(
        estimators=["grad_dot", {"name": "cg", "damping": 0.1}, {"name": "mirrored", "seeds": 1}],
        resources={"witnesses": 1},
    )
    resolved = resolve(spec, beside)
    plan = current_plan(resolved.manifest, None)
    said: list[str] = []
    measured = measure(resolved, plan, None, said.append)
    kinds = [sum(isinstance(t, kind) for t, _ in measured.tasks) for kind in (Shard, EstimateTask, WitnessTask)]
    assert kinds == [len(plan.shards), 3, 1]
    assert all(seconds > 0 for _, seconds in measured.tasks)
    assert {name for name, _ in measured.by_estimator()} == {"grad_dot", "cg", "mirrored"}
    assert any("estimator mirrored" in line for line in said)
    values = measured_json(measured, 2.0)
    assert values["device_seconds"] == pytest.approx(sum(s for _, s in measured.tasks))
    text = "\n".join(plan_lines({**_plan_json(resolved, plan), "unused": {}, **values}))
    assert "estimator mirrored (seeds=1)" in text
    assert "e-0" not in text
    _, store, _ = run_here(spec, beside)
    sweep = Sweep(store, "flowers")
    rest = measure(resolved, current_plan(resolved.manifest, sweep), sweep)
    assert rest.tasks == []
    assert rest.proof < measured.proof, "a verdict that is there is not made again"


def test_tasks_are_spread_over_workers_in_the_order_in_which_a_run_hands_them_out():
    shard, estimate = Shard(0, ()), EstimateTask("cg", "{}", (), 0, 1)
    measured = Measured("cpu", 2, 1, "", 1.0, 3.0, 0.0, 0.0, [(shard, 2.0), (shard, 2.0), (estimate, 10.0)])
    # The estimate first, beside it both shards.
    assert measured.wall(5.0) == pytest.approx(5 + 4 + (5 + 1 + 3) + 10 + 2)
    assert measured.seconds(Shard) == 4.0


def test_a_part_of_a_problem_keeps_its_removals_inside_its_training_examples(beside):
    resolved = resolve(make_spec(), beside)
    cpu = torch.device("cpu")
    train, evals = resolved.examples(cpu)
    whole = estimators.Problem(
        resolved.model(cpu), train, evals, [(0,), (3, 16), (11,), (22,)], resolved.spec.further_training.settings()
    )
    part = part_of(whole, 0.5, 0.5, trains=False)
    assert (len(part.train), len(part.evals), len(part.removals)) == (max(16, round(len(train) / 2)), 4, 2)
    assert all(0 <= i < len(part.train) for removal in part.removals for i in removal)
    [grad_dot] = estimators.parse("grad_dot")
    assert grad_dot.estimate(part).values.shape == (2, 4)
    fewer = part_of(whole, 0.5, 0.5, trains=True)
    assert len(fewer.train) == len(train)
    assert fewer.at is not None
    assert max(fewer.at) <= resolved.manifest.steps[-1] / 2
    sides = [(len(p.evals), len(p.removals), len(p.train)) for p in parts_of(whole, trains=False)]
    assert sides == [(7, 4, 16)], "of few examples nothing but the training examples is left to be cut"
    many = dataclasses.replace(whole, removals=[(i,) for i in range(20)])
    shapes = [(len(p.removals), len(p.train)) for p in parts_of(many, trains=False)]
    assert shapes == [(10, 23), (5, 23), (5, 16)], "removals and evaluation examples first"


@pytest.mark.parametrize(
    ("work", "seconds", "told"),
    [
        ([10.0], [3.0], 3.0),
        ([5.0], [3.0], 6.0),
        ([5.0, 2.5], [6.0, 4.0], 10.0),
        ([5.0, 2.5], [4.0, 4.5], 4.0),
        ([5.0, 2.5], [6.0, 0.5], 12.0),
    ],
    ids=["whole", "in proportion", "with what is fixed", "all is fixed", "nothing is fixed"],
)
def test_what_a_part_takes_whatever_its_size_is_not_multiplied(work, seconds, told):
    assert extrapolated(10.0, work, seconds) == pytest.approx(told)


def test_a_cell_alone_is_timed_apart_from_a_baseline_alone(beside, monkeypatch):
    """A removed example's loss is subtracted at every step: a forward and a backward pass more."""
    seen = []

    def counted(start, lanes, seed, budget_s):
        seen.append(tuple(lanes))
        return Pace(1.0 + sum(map(len, lanes)), 0.0, 0.0)

    monkeypatch.setattr(timing, "pace", counted)
    resolved = resolve(make_spec(further_training={"removal_mode": "reweight"}), beside)
    start = resolved.start(torch.device("cpu"))
    engine = Proven(start.using(dataclasses.replace(start.engine, stack=False)), 1, {})
    steps = resolved.manifest.steps[-1]
    # Two cells at 2 s a step, the baseline and the second, which is a stack of one too, at 1 s.
    assert timing.Shards(engine, 0).seconds([(3,), (5,)]) == steps * (2 + 2 + 1 + 1)
    assert seen == [((),), ((3,),)]


def test_a_pace_counts_steps_evaluations_and_what_the_first_steps_take(beside):
    assert Pace(2.0, 3.0, 5.0).seconds(10, 4) == 5 + 20 + 12
    start = resolve(make_spec(), beside).start(torch.device("cpu"))
    for lanes in ([BASELINE], [BASELINE, (3,), (5,)]):
        found = pace(start, lanes, 0, 0.2)
        assert found.step > 0
        assert found.evaluation >= 0
        assert found.first >= 0


@pytest.mark.parametrize(("seconds", "told"), [(0.3387, "0.34 s"), (94.4, "94 s"), (700, "12 min"), (90000, "25.0 h")])
def test_seconds_are_seconds_where_hours_would_be_a_ten_thousandth(seconds, told):
    assert short(seconds) == told
