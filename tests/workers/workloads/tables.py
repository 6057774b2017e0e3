"""Small files shaped like the data sets that fimo may not ship."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

_HELOC = (
    "ExternalRiskEstimate MSinceOldestTradeOpen MSinceMostRecentTradeOpen AverageMInFile NumSatisfactoryTrades "
    "NumTrades60Ever2DerogPubRec NumTrades90Ever2DerogPubRec PercentTradesNeverDelq MSinceMostRecentDelq "
    "MaxDelq2PublicRecLast12M MaxDelqEver NumTotalTrades NumTradesOpeninLast12M PercentInstallTrades "
    "MSinceMostRecentInqexcl7days NumInqLast6M NumInqLast6Mexcl7days NetFractionRevolvingBurden "
    "NetFractionInstallBurden NumRevolvingTradesWBalance NumInstallTradesWBalance "
    "NumBank2NatlTradesWHighUtilization PercentTradesWBalance"
)
HELOC = _HELOC.split()


def write(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_energy(path: Path, rows: int) -> Path:
    """X1 to X8, Y1 and Y2 as in ENB2012, with the empty rows and columns of its copies."""
    table = np.random.default_rng(0).normal(size=(rows, 10)).round(3)
    names = [f"X{i}" for i in range(1, 9)]
    lines: list[list[object]] = [[*row, "", ""] for row in table.tolist()]
    return write(path, [*names, "Y1", "Y2", "", ""], [*lines, *[[""] * 12] * 3])


def write_heloc(path: Path, rows: int) -> Path:
    """HELOC's columns with special codes, and every twentieth row without a record."""
    rng = np.random.default_rng(1)
    table = rng.integers(0, 9, size=(rows, 23))
    table[rng.random(table.shape) < 0.1] = -8
    table[rng.random(table.shape) < 0.05] = -9
    for place in (8, 14):
        table[rng.random(rows) < 0.3, place] = -7
    table[::20] = -9
    labels = rng.choice(["Bad", "Good"], size=rows)
    return write(path, ["RiskPerformance", *HELOC], [[y, *x] for y, x in zip(labels, table.tolist(), strict=True)])


def write_acs(root: Path, people: int) -> Path:
    """A person file and definitions where folktables puts them for Massachusetts in 2018."""
    rng, folder = np.random.default_rng(2), root / "2018" / "1-Year"
    folder.mkdir(parents=True)
    codes = {"COW": 8, "SCHL": 24, "MAR": 5, "OCCP": 40, "POBP": 9, "RELP": 17, "SEX": 2, "RAC1P": 9}
    columns = {name: rng.integers(1, most + 1, people).astype(object) for name, most in codes.items()}
    columns["COW"][::9] = ""
    numbers = {
        "SERIALNO": np.arange(people),
        "AGEP": rng.integers(5, 90, people),
        "WKHP": rng.integers(0, 80, people),
        "PINCP": rng.integers(0, 120_000, people),
        "PWGTP": rng.integers(0, 100, people),
    }
    every = {**numbers, **columns}
    write(folder / "psam_p25.csv", list(every), [list(row) for row in zip(*every.values(), strict=True)])
    # The names are in another order than the numbers, as in the real ones.
    lines: list[list[object]] = [
        ["VAL", name, "C", 2, code, code, f"kind {(7 * code) % 41:02d} of {name}"]
        for name, most in codes.items()
        for code in range(1, most + 1)
    ]
    lines += [["VAL", "COW", "C", 1, "b", "b", "N/A (less than 16 years old)"]]
    lines += [["VAL", name, "N", 2, 0, 99, "a number"] for name in ("AGEP", "WKHP")]
    with (folder / "definition.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    return root
