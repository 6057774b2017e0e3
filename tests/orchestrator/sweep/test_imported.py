from __future__ import annotations

import io
import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save

from fimo.orchestrator.commands.import_scores import take_scores
from fimo.orchestrator.commands.pull import pull_tables
from fimo.orchestrator.run import gather
from fimo.orchestrator.store import open_store
from fimo.orchestrator.sweep import imported
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import UsageError
from tests.support.small_sweep import OWN, copied, make_spec, run_here

VALUES = np.random.default_rng(0).normal(size=(5, 7))


def parquet(**columns) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def frame(values: pd.DataFrame) -> bytes:
    sink = io.BytesIO()
    values.to_parquet(sink)
    return sink.getvalue()


def npy(values) -> bytes:
    sink = io.BytesIO()
    np.save(sink, values, allow_pickle=True)
    return sink.getvalue()


def long_form(values, **more) -> bytes:
    removal, example = np.indices(values.shape)
    return parquet(removal=removal.ravel(), eval=example.ravel(), value=values.ravel(), **more)


WIDE = pd.DataFrame(VALUES, columns=[str(i) for i in range(7)])
FORMS = {
    "npy": npy(VALUES),
    "safetensors": save({"scores": VALUES}),
    "long parquet": long_form(VALUES),
    "wide parquet": parquet(**{str(i): VALUES[:, i] for i in range(7)}),
    "frame": frame(WIDE),
    "frame of removed examples": frame(WIDE.set_axis([0, 3, 5, 11, 22])),
    "transposed npy": npy(VALUES.T),
    "wide.csv": "\n".join(",".join(map(repr, row)) for row in VALUES.tolist()).encode(),
    "long.csv": "\n".join(
        ["removal,eval,value", *(f"{r},{e},{float(VALUES[r, e])!r}" for e in range(7) for r in range(5))]
    ).encode(),
}


@pytest.fixture(scope="module")
def once():
    report, store, _ = run_here(make_spec(), OWN)
    return report, store


@pytest.fixture
def swept(once):
    report, store = once
    sweep = Sweep(copied(store), "flowers")
    return sweep, sweep.read_manifest(), report


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("negate", [False, True])
def test_a_matrix_of_any_kind_is_scored_like_an_estimator(swept, form, negate):
    sweep, manifest, _ = swept
    imported.import_scores(sweep, manifest, FORMS[form], f"folder/{form}", "theirs", negate)
    gathered = gather.gather(sweep, manifest)
    estimates = gathered.tables["estimates"].to_pandas().query("estimator == 'theirs'")
    np.testing.assert_array_equal(estimates["value"].to_numpy().reshape(5, 7), -VALUES if negate else VALUES)
    effects = gathered.tables["attribution"].to_pandas().query("step == 9")["effect"].to_numpy().reshape(5, 7)
    signed = -VALUES if negate else VALUES
    cosines = (effects * signed).sum(0) / np.linalg.norm(effects, axis=0) / np.linalg.norm(signed, axis=0)
    [row] = (
        gathered.tables["scores"]
        .to_pandas()
        .query("estimator == 'theirs' and step == 9 and seeds == 4 and metric == 'cosine' and adjust == 'baseline'")
        .to_dict("records")
    )
    assert row["score"] == pytest.approx(cosines.mean(), abs=1e-12)


def test_scores_by_step_are_scored_at_their_steps(swept):
    sweep, manifest, _ = swept
    both = np.concatenate([VALUES.ravel(), 2 * VALUES.ravel()])
    removal, example = (np.tile(i.ravel(), 2) for i in np.indices((5, 7)))
    data = parquet(removal=removal, eval=example, value=both, step=np.repeat([3, 9], 35))
    part = imported.import_scores(sweep, manifest, data, "x", "theirs", False)
    assert part.steps == (3, 9)
    np.testing.assert_array_equal(part.values[1], 2 * VALUES)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (npy(VALUES[:4]), "shape \\(4, 7\\)"),
        (npy(VALUES[:, :6]), "shape \\(5, 6\\)"),
        (npy(VALUES[None]), "shape \\(1, 5, 7\\)"),
        (parquet(removal=[0.5], eval=[0], value=[1.0]), "whole"),
        (npy(np.where(VALUES > 1, np.nan, VALUES)), "not finite"),
        (npy(np.array([{"a": 1}], dtype=object)), "plain numbers"),
        (npy(VALUES + 1j), "plain numbers"),
        (save({"a": VALUES, "b": VALUES}), "2 tensors"),
        (long_form(VALUES[:, :6]), "missing or not finite"),
        (parquet(removal=[9], eval=[0], value=[1.0]), "does not have"),
        (parquet(removal=[0, 0], eval=[0, 0], value=[1.0, 2.0]), "twice"),
        (parquet(a=["x"]), "numbers"),
        (frame(WIDE.iloc[[1, 0, 2, 3, 4]]), "rows 1, 0, 2, 3, 4, but a matrix is read by place"),
        (frame(WIDE[list("0213456")]), "columns 0, 2, 1, 3, 4, 5 …, but"),
        (long_form(VALUES, step=np.full(35, 4)), "for step 4, none for those that are recorded: 3, 6, 9, 10"),
        (long_form(VALUES, step=pa.array([3, None] * 17 + [3])), "must be numbers"),
        (long_form(VALUES.astype("datetime64[s]")), "must be numbers"),
        (FORMS["long parquet"][:-9], "Parquet"),
        (pickle.dumps(VALUES), "neither"),
        (b"", "neither"),
    ],
)
def test_a_foreign_file_is_refused_in_one_line(swept, data, said):
    sweep, manifest, _ = swept
    with pytest.raises(UsageError, match=said) as caught:
        imported.import_scores(sweep, manifest, data, "file", "theirs", False)
    assert "\n" not in str(caught.value)
    assert not list(sweep.store.list("flowers/imported/"))


@pytest.mark.parametrize("name", ["cg", "../x", "", "a/b"])
def test_a_name_that_is_taken_or_no_name_is_refused(swept, name):
    sweep, manifest, _ = swept
    with pytest.raises(UsageError):
        imported.import_scores(sweep, manifest, FORMS["npy"], "file", name, False)


def test_the_command_keeps_the_matrix_and_pull_brings_it(beside, tmp_path):
    store = open_store(str(tmp_path / "store"))
    run_here(make_spec(), beside, store)
    (tmp_path / "theirs.npy").write_bytes(FORMS["npy"])
    uri = f"{tmp_path / 'store'}/flowers"
    values, table = take_scores(tmp_path / "theirs.npy", uri, "theirs", False)
    assert table is not None
    assert {r["metric"] for r in values["scores"]} == {"cosine", "spearman"}
    pulled = pull_tables(uri, tmp_path / "out", "parquet", lambda line: None)
    assert pulled["complete"]
    assert "theirs" in pq.read_table(pulled["tables"]["scores"])["estimator"].to_pylist()
    # A second run of the spec keeps it.
    report, _, heard = run_here(make_spec(), beside, store)
    assert heard.tasks == []
    assert "theirs" in report.gathered.tables["scores"]["estimator"].to_pylist()


@pytest.mark.parametrize("change", [{"removals": {"indices": [0, 3, 5, 11, 22, 7]}}, {"evals": 6}])
def test_scores_of_an_earlier_spec_are_not_left_out_in_silence(beside, change):
    _, store, _ = run_here(make_spec(), beside)
    sweep = Sweep(store, "flowers")
    imported.import_scores(sweep, sweep.read_manifest(), FORMS["npy"], "x", "theirs", False)
    report, _, _ = run_here(make_spec(**change), beside, store, replace_other=True)
    [line] = [line for line in report.gathered.warnings if "'theirs'" in line]
    assert "import them again" in line
    assert "theirs" not in report.gathered.tables["estimates"]["estimator"].to_pylist()


def test_estimates_alone_need_no_further_training(beside):
    report, store, _ = run_here(make_spec(), beside, shards=False)
    assert report.exit_code == 0
    assert not list(store.list("flowers/parts/"))
    assert set(report.gathered.tables["estimates"]["estimator"].to_pylist()) == {"grad_dot", "grad_cos"}
    report, _, heard = run_here(make_spec(), beside, store)
    assert report.exit_code == 0
    assert len(heard.tasks) == 12


def test_estimators_that_follow_training_depend_on_it_and_others_do_not(beside):
    from fimo.orchestrator.resolve.resolved import resolve
    from fimo.orchestrator.run.blocks import estimate_identity

    def identity(estimator, params="{}", **changes):
        m = resolve(make_spec(**changes), beside).manifest
        return estimate_identity(m.digest, m.estimate_digest, m.spec, estimator, params)

    other = {"further_training": {"optimizer": {"name": "sgd", "lr": 0.2}}}
    kept = '{"training_gradient":"further","displacement_step":3}'
    assert identity("grad_dot") == identity("grad_dot", **other) == identity("grad_dot", seeds=9)
    for name, params in (("unrolled", "{}"), ("ekfac_matched", "{}"), ("datainf", kept)):
        assert identity(name, params) != identity(name, params, **other)
    assert identity("unrolled") != identity("unrolled", seeds=9)
    checked = '{"seeds":2,"own_seeds":true}'
    assert identity("unrolled", checked) == identity("unrolled", checked, seeds=9)
    assert identity("datainf", kept) != identity("datainf", kept, seeds=9)


def test_the_generalised_influence_function_gets_the_baseline_s_mean_displacement(beside):
    wanted = {"name": "datainf", "training_gradient": "further", "displacement_step": 3}
    report, _, _ = run_here(make_spec(estimators=[wanted, "datainf"]), beside)
    assert report.exit_code == 0
    values = report.gathered.tables["estimates"].to_pandas()
    one, other = (values[values["params"] == p]["value"].to_numpy() for p in values["params"].unique())
    assert not np.allclose(one, other)
    far = {"name": "datainf", "training_gradient": "further", "displacement_step": 3000}
    report, _, _ = run_here(make_spec(estimators=[far], name="far"), beside)
    assert report.exit_code == 1
    assert "lies beyond" in report.failures.aside[0].line


def test_a_library_s_whole_matrix_is_scored_as_the_removals_rows_of_it(beside, tmp_path, shell):
    """Query × train, as captum, pyDVL and kronfluence give it, over groups: their members' sums, and it is said."""
    store = open_store(str(tmp_path / "store"))
    groups = {"a": [0, 3], "b": [5], "c": [2, 11, 22], "d": [1], "e": [7, 8]}
    run_here(make_spec(removals={"groups": groups}), beside, store)
    whole = np.random.default_rng(1).normal(size=(9, 23))
    np.save(tmp_path / "theirs.npy", whole)
    done = shell("import-scores", tmp_path / "theirs.npy", f"{tmp_path}/store/flowers", "--name", "theirs")
    assert done.code == 0, done.err
    assert (
        "read as evals × training examples: transposed, the 5 removals' rows taken, summed over each removal's "
        "examples, the first 7 of 9 evaluation examples taken" in done.err
    )
    pulled = pull_tables(f"{tmp_path}/store/flowers", tmp_path / "out", "parquet", lambda line: None)
    kept = pq.read_table(pulled["tables"]["estimates"]).to_pandas().query("estimator == 'theirs'")["value"].to_numpy()
    expected = [[sum(whole[e, i] for i in members) for e in range(7)] for members in groups.values()]
    np.testing.assert_allclose(kept.reshape(5, 7), expected, rtol=1e-15)
    wrong = shell(
        "import-scores", tmp_path / "theirs.npy", f"{tmp_path}/store/flowers", "--name", "x", "--layout", "up"
    )
    assert (wrong.code, len(wrong.err.splitlines())) == (2, 1)
    assert "--layout 'up' is none" in wrong.err
