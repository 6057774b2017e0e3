"""Other tools' arrays, read as data, and ``fimo audit`` on them from a shell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from fimo.orchestrator.run.arrays import read_effects, read_estimates
from fimo.workers.errors import UsageError

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=(6, 4))
EFFECTS = TRUTH + RNG.normal(size=(3, 6, 4))


def long(values: np.ndarray, names: list[str], value: str, **more: list) -> pa.Table:
    places = np.indices(values.shape).reshape(values.ndim, -1)
    return pa.table({**dict(zip(names, places, strict=True)), value: values.reshape(-1), **more})


def test_effects_are_the_same_from_every_format(tmp_path: Path):
    np.save(tmp_path / "e.npy", EFFECTS)
    save_file({"effects": EFFECTS}, tmp_path / "e.safetensors")
    table = long(EFFECTS, ["seed", "removal", "eval"], "effect")
    pq.write_table(table.take(RNG.permutation(table.num_rows)), tmp_path / "e.parquet")
    for name in ("e.npy", "e.safetensors", "e.parquet"):
        np.testing.assert_array_equal(read_effects(tmp_path / name).values, EFFECTS)


def test_a_row_that_a_table_lacks_is_a_missing_run(tmp_path: Path):
    table = long(EFFECTS, ["seed", "removal", "eval"], "effect")
    pq.write_table(table.slice(1), tmp_path / "e.parquet")
    effects = read_effects(tmp_path / "e.parquet").values
    assert np.isnan(effects[0, 0, 0])
    assert np.isfinite(effects).sum() == EFFECTS.size - 1


def test_methods_go_by_their_file_tensor_or_column(tmp_path: Path):
    np.save(tmp_path / "mine.npy", TRUTH)
    save_file({"a": TRUTH, "b": 2 * TRUTH}, tmp_path / "two.safetensors")
    both = [long(v, ["removal", "eval"], "value", estimator=[n] * 24) for n, v in (("x", TRUTH), ("y", -TRUTH))]
    pq.write_table(pa.concat_tables(both), tmp_path / "two.parquet")
    assert list(read_estimates(str(tmp_path / "mine.npy"))) == ["mine"]
    assert list(read_estimates(f"yours={tmp_path / 'mine.npy'}")) == ["yours"]
    assert list(read_estimates(str(tmp_path / "two.safetensors"))) == ["a", "b"]
    named = read_estimates(str(tmp_path / "two.parquet"))
    np.testing.assert_array_equal(named["y"].values, -TRUTH)


def test_estimates_of_other_removals_or_evaluation_examples_are_refused_not_lined_up(tmp_path: Path):
    def table(values: np.ndarray, axes: list[str], value: str, **shift: int) -> pa.Table:
        one = long(values, axes, value)
        columns = {n: pc.add(one[n], shift[n]) if n in shift else one[n] for n in one.column_names}
        return pa.table(columns)

    pq.write_table(table(EFFECTS, ["seed", "removal", "eval"], "effect", removal=3), tmp_path / "e.parquet")
    effects = read_effects(tmp_path / "e.parquet")
    for shift, said in (
        ({"removal": 3}, None),
        ({"removal": 4}, "other removals"),
        ({"eval": 1, "removal": 3}, "evals"),
    ):
        pq.write_table(table(TRUTH, ["removal", "eval"], "value", **shift), tmp_path / "m.parquet")
        [matrix] = read_estimates(str(tmp_path / "m.parquet")).values()
        if said is None:
            np.testing.assert_array_equal(matrix.beside(effects, "m"), TRUTH)
        else:
            with pytest.raises(UsageError, match=said):
                matrix.beside(effects, "m")
    np.save(tmp_path / "plain.npy", TRUTH)
    [plain] = read_estimates(str(tmp_path / "plain.npy")).values()
    np.testing.assert_array_equal(plain.beside(effects, "plain"), TRUTH)


def test_what_cannot_be_read_is_said_in_a_line(tmp_path: Path):
    np.save(tmp_path / "objects.npy", np.array([object()]))
    (tmp_path / "text").write_text("no array")
    pq.write_table(pa.table({"seed": [0], "removal": [0], "effect": [1.0]}), tmp_path / "no_eval.parquet")
    pq.write_table(
        long(EFFECTS, ["seed", "removal", "eval"], "effect", step=[1] * 71 + [2]), tmp_path / "steps.parquet"
    )
    twice = long(EFFECTS, ["seed", "removal", "eval"], "effect")
    pq.write_table(pa.concat_tables([twice, twice.slice(0, 1)]), tmp_path / "twice.parquet")
    for name, said in (
        ("none.npy", "cannot be read"),
        ("objects.npy", "plain numbers"),
        ("text", "neither"),
        ("no_eval.parquet", "no column eval"),
        ("steps.parquet", "several steps"),
        ("twice.parquet", "two rows"),
    ):
        with pytest.raises(UsageError, match=said):
            read_effects(tmp_path / name)


def test_an_audit_from_a_shell(tmp_path: Path):
    np.save(tmp_path / "e.npy", EFFECTS)
    np.save(tmp_path / "perfect.npy", TRUTH)
    np.save(tmp_path / "wrong.npy", -TRUTH)
    command = [sys.executable, "-c", "from fimo.orchestrator.commands.main import main; main()", "audit", "e.npy"]
    told = subprocess.run(
        [*command, "perfect.npy", "wrong.npy"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "reliability" in told.stdout
    assert "more than noise" in told.stdout
    plain = subprocess.run(
        [*command, "perfect.npy", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert {r["estimator"] for r in json.loads(plain.stdout)["scores"]} == {"perfect"}
    refused = subprocess.run([*command, "none.npy"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr == "fimo: 'none.npy' cannot be read: No such file or directory\n"
