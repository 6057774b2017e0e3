"""From a spec's ``removals`` to numbered, named sets of training indices."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fimo.orchestrator.spec import limits
from fimo.orchestrator.spec.parquet import read_parquet
from fimo.orchestrator.spec.spec import RemovalsSection
from fimo.orchestrator.spec.yaml import read_yaml
from fimo.workers.errors import UsageError

Read = Callable[[str], bytes]
"""The bytes of a file by the name that a spec gives it."""

Column = Callable[[str], NDArray[np.generic]]
"""One value for each training example, (n,), by the name that a spec gives it."""

MOST_GROUPS = {"b": 2, "i": 1000, "u": 1000, "f": 100}
"""Kind of a column's dtype -> the most distinct values for which it is a grouping."""


@dataclass(frozen=True)
class NamedRemoval:
    """One removal: its number in spec order, its name, and its training indices, ascending."""

    number: int
    name: str
    indices: tuple[int, ...]


def number_removals(spec: RemovalsSection, n: int, read: Read, column: Column) -> list[NamedRemoval]:
    """Number the removals of a spec against ``n`` training examples.

    ``random`` draws a prefix of one permutation of the seed, and ``fraction`` its groups one after another, so that a
    larger number keeps a smaller one's removals.

    Args:
        read: the bytes of a file named by ``from``; ``column``: the values of a training tensor named by ``by``.

    Raises:
        UsageError: an index outside the training set, given twice in one removal, a removal of everything, a fraction
            that is less than one example, or a column that is no grouping.
    """
    if spec.every is not None:
        last = n if spec.count is None else spec.every * spec.count
        if last - spec.every >= n:
            outside = spec.every * -(-n // spec.every)
            raise UsageError(
                f"removals.every {spec.every}, count {spec.count} names training example {outside}; there are {n}"
            )
        named = [(str(i), [i]) for i in range(0, last, spec.every)]
    elif spec.indices is not None:
        named = [(str(i), [i]) for i in spec.indices]
    elif spec.random is not None:
        if spec.random > n:
            raise UsageError(f"removals.random asks for {spec.random} of {n} training examples")
        order = np.random.RandomState(spec.seed or 0).permutation(n)
        named = [(str(i), [int(i)]) for i in order[: spec.random]]
    elif spec.fraction is not None:
        named = _random_groups(spec.fraction, spec.count or 0, spec.seed or 0, n)
    elif spec.by is not None:
        named = _by_value(spec.by, column(spec.by))
    elif spec.groups is not None:
        named = [(name, list(indices)) for name, indices in spec.groups.items()]
    elif spec.file is not None:
        named = _from_file(spec.file, read(spec.file))
    else:
        named = [(str(i), [i]) for i in range(n)]
    if spec.indices is not None and len(set(spec.indices)) < len(spec.indices):
        twice = next(i for i, times in Counter(spec.indices).items() if times > 1)
        raise UsageError(f"removals.indices names training example {twice} twice: name it once")
    limits.check_removals([len(indices) for _, indices in named])
    return [_checked(number, name, indices, n) for number, (name, indices) in enumerate(named)]


def check_removals(removals: Sequence[NamedRemoval], n: int) -> list[NamedRemoval]:
    """Numbered removals as they are, against ``n`` training examples; raises UsageError."""
    return [_checked(number, removal.name, list(removal.indices), n) for number, removal in enumerate(removals)]


def _checked(number: int, name: str, indices: list[int], n: int) -> NamedRemoval:
    outside = [i for i in indices if not 0 <= i < n]
    if outside:
        raise UsageError(f"removal '{name}' names training example {outside[0]}; there are {n} (0 to {n - 1})")
    if len(set(indices)) != len(indices):
        raise UsageError(f"removal '{name}' names a training example twice")
    if len(indices) == n:
        raise UsageError(f"removal '{name}' leaves no training example")
    return NamedRemoval(number, name, tuple(sorted(indices)))


def _random_groups(fraction: float, count: int, seed: int, n: int) -> list[tuple[str, list[int]]]:
    """Groups of ``round(fraction · n)`` examples each, drawn without replacement (Ilyas et al. 2022; Park et al. 2023).

    All come from one ``numpy.random.default_rng(seed)``, one ``choice`` after another.
    """
    size = round(fraction * n)
    if not 1 <= size < n:
        raise UsageError(
            f"removals.fraction {fraction:g} of {n} training examples is {size} of them: "
            + ("give a larger fraction" if size < 1 else "a removal must leave some, give a smaller one")
        )
    limits.check_removals([size * count])
    generator = np.random.default_rng(seed)
    draws = (generator.choice(n, size=size, replace=False) for _ in range(count))
    return [(f"random-{number}", [int(i) for i in draw]) for number, draw in enumerate(draws)]


def _by_value(name: str, values: NDArray[np.generic]) -> list[tuple[str, list[int]]]:
    """One group for each value of a column, ascending, called ``NAME=VALUE``."""
    distinct, which = np.unique(values, return_inverse=True)
    most = MOST_GROUPS[values.dtype.kind]
    if len(distinct) == 1:
        raise UsageError(f"removals.by: '{name}' has one value alone, and its group would be every training example")
    if len(distinct) > most or len(distinct) == len(values):
        raise UsageError(
            f"removals.by: '{name}' has {len(distinct)} values in {len(values)} training examples, which is no "
            f"grouping (at most {most}, some of them shared); list groups by hand, or use fraction"
        )
    order = np.argsort(which, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(which))[:-1])
    return [(f"{name}={_shown(v)}", group.tolist()) for v, group in zip(distinct, groups, strict=True)]


def _shown(value: np.generic) -> str:
    """A value as a group's name has it: whole floats without a point, others in the fewest digits that tell them."""
    if value.dtype.kind == "b":
        return str(value).lower()
    return str(value).removesuffix(".0")


def _from_file(name: str, data: bytes) -> list[tuple[str, list[int]]]:
    """Removals from a file: Parquet as pulled (name, indices), JSON or YAML (list, or name: list), or plain lines."""
    if data[:4] == b"PAR1":
        return _from_parquet(name, data)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"removals from '{name}': neither Parquet nor text") from error
    if name.endswith((".json", ".yaml", ".yml")):
        values = json.loads(text) if name.endswith(".json") and _is_json(text) else read_yaml(text, name)
        rows = list(values.items()) if isinstance(values, dict) else [(None, v) for v in values or []]
    else:
        lines = [line.split("#")[0].replace(",", " ").split() for line in text.splitlines()]
        rows = [(None, line) for line in lines if line]
    return [_row(name, key, value) for key, value in rows]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _row(file: str, key: object, value: object) -> tuple[str, list[int]]:
    try:
        indices = [_index(v) for v in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError) as error:
        raise UsageError(f"removals from '{file}': {str(value)[:40]!r} is not an index or a list of indices") from error
    return (str(key) if key is not None else "+".join(map(str, indices)), indices)


def _index(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return int(value)


def _from_parquet(name: str, data: bytes) -> list[tuple[str, list[int]]]:
    try:
        table = read_parquet(data, columns=["name", "indices"])
    except (pa.ArrowException, OSError, LookupError, ValueError) as error:
        raise UsageError(f"removals from '{name}': not a Parquet file with columns name and indices") from error
    pairs = zip(table["name"].to_pylist(), table["indices"].to_pylist(), strict=True)
    return [_row(name, key, value) for key, value in pairs]
