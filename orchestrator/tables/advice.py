"""Which amount of further training to take, with its reason, and what to do if there is none. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fimo.orchestrator.tables.amounts import Amount

RELIABLE, STABLE, SMOOTH, DROWNED, LIMIT = 0.5, 0.9, 0.7, 0.5, 0.9
"""Least reliability, agreement with a neighbour and metasmoothness; most share under the noise floor; least agreement
with the infinitesimal limit for a first-order estimator to work."""

EXPLODED, UNDER, UNRELIABLE, UNSTABLE, ROUGH = "exploded", "under the floor", "unreliable", "unstable", "not metasmooth"
CLOSER = "record amounts that lie closer together"


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        steps: the amounts to take, neighbours of each other among those looked at; empty if none can be.
        qualified: nothing speaks against them.
        first_order: those of them at which a first-order estimator can work; None if it is not known of any.
        lines: the same in words, the recommendation first.
    """

    steps: tuple[int, ...]
    qualified: bool
    first_order: tuple[int, ...] | None
    lines: tuple[str, ...]


def faults(amount: Amount, alone: bool = False) -> tuple[str, ...]:
    """What speaks against an amount, the worst first; one that is ``alone`` has no neighbour to agree with."""
    if amount.exploded:
        # Of what has exploded no other figure means anything.
        return (EXPLODED,)
    unreliable = amount.reliability is None or amount.reliability < RELIABLE
    rough = amount.metasmoothness is not None and amount.metasmoothness < SMOOTH
    found = [
        (UNDER, amount.under_floor is None or amount.under_floor > DROWNED),
        (UNRELIABLE, unreliable),
        # Not known of what is unreliable, it is no further fault.
        (UNSTABLE, not alone and (not unreliable if amount.stability is None else amount.stability < STABLE)),
        (ROUGH, rough),
    ]
    return tuple(fault for fault, there in found if there)


def advise(amounts: Sequence[Amount]) -> Advice:
    """The longest run of neighbouring amounts that nothing speaks against; else the most reliable of what can be seen.

    An amount that has exploded or is mostly under the noise floor is never taken.
    """
    alone = len(amounts) == 1
    against = {a.step: faults(a, alone) for a in amounts}
    best = _longest(amounts, lambda a: not against[a.step])
    if best:
        others = [a for a in amounts if not against[a.step] and a not in best]
        return _advice(best, True, [*_range(best, alone), *_others(others), *_beside(amounts, best, against)])
    seen = [a for a in amounts if not {EXPLODED, UNDER} & set(against[a.step]) and a.reliability is not None]
    if seen and all(UNRELIABLE in against[a.step] for a in seen):
        most = max(seen, key=lambda a: (a.reliability or 0, -a.step))
        line = (
            f"no amount is reliable: the most reliable is step {most.step}, {most.reliability:.2f} with {most.seeds} "
            "seeds (ranks of single removals are noise there)"
        )
        return _advice([most], False, [line, *_mends(amounts, against)])
    return Advice((), False, None, ("no amount can be recommended", *_mends(amounts, against)))


def _longest(amounts: Sequence[Amount], good: Callable[[Amount], bool]) -> list[Amount]:
    """The longest run, of equally long ones the last."""
    runs: list[list[Amount]] = [[]]
    for amount in amounts:
        if good(amount):
            runs[-1].append(amount)
        else:
            runs.append([])
    return max(reversed(runs), key=len)


def _advice(taken: Sequence[Amount], qualified: bool, lines: Sequence[str]) -> Advice:
    known = [a for a in taken if a.first_order is not None]
    works = tuple(a.step for a in known if (a.first_order or 0) >= LIMIT)
    steps = tuple(a.step for a in taken)
    return Advice(steps, qualified, works if known else None, (*lines, _first_order(steps, known, works)))


def _range(best: Sequence[Amount], alone: bool) -> Iterator[str]:
    first, last = best[0].step, best[-1].step
    which = f"take step {first}" if first == last else f"take {first} to {last} steps of further training"
    reasons = [f"reliability {_least(a.reliability for a in best)} with {best[-1].seeds} seeds"]
    if not alone:
        reasons.append(f"agreement with a neighbouring amount {_least(a.stability for a in best)}")
    if any(a.metasmoothness is not None for a in best):
        reasons.append(f"metasmoothness {_least(a.metasmoothness for a in best)}")
    yield f"{which}: {', '.join(reasons)}" + ("" if first == last else ", each at least")
    if alone:
        yield "one amount is recorded, so nothing is known of its stability: record more, evaluate: {every_epochs: 1}"


def _least(values: Iterator[float | None]) -> str:
    return f"{min(v for v in values if v is not None):.2f}"


def _others(others: Sequence[Amount]) -> Iterator[str]:
    if others:
        yield f"{_steps([a.step for a in others])} would do too"


def _beside(amounts: Sequence[Amount], best: Sequence[Amount], against: dict[int, tuple[str, ...]]) -> Iterator[str]:
    """Why the others are not taken, one line for each first fault."""
    left = [a for a in amounts if a not in best and against[a.step]]
    for fault in (EXPLODED, UNDER, UNRELIABLE, UNSTABLE, ROUGH):
        of = [a.step for a in left if against[a.step][0] == fault]
        if of:
            yield f"not {_steps(of)}: {fault}" + (f" ({CLOSER})" if fault == UNSTABLE else "")


def _first_order(steps: Sequence[int], known: Sequence[Amount], works: Sequence[int]) -> str:
    if not known:
        return "whether a first-order estimator can work there is not known"
    if len(works) == len(steps):
        return "a first-order estimator can work there: the attribution points as its infinitesimal limit does"
    furthest = f"at best {max(a.first_order or 0 for a in known):.2f} of what is possible"
    if not works:
        return f"a first-order estimator cannot work there: it agrees with the attribution {furthest}"
    return f"a first-order estimator can work at {_steps(works)} alone of these"


def _mends(amounts: Sequence[Amount], against: dict[int, tuple[str, ...]]) -> Iterator[str]:
    """What to change, one line for each kind of fault that comes first at an amount."""
    first = {fault: [a for a in amounts if against[a.step][:1] == (fault,)] for fault in (EXPLODED, UNDER, UNRELIABLE)}
    if first[EXPLODED]:
        yield f"exploded at {_steps([a.step for a in first[EXPLODED]])}: lower the learning rate, clip, or train less"
    if first[UNDER]:
        yield f"under the noise floor at {_steps([a.step for a in first[UNDER]])}: {_lift(first[UNDER])}"
    if first[UNRELIABLE]:
        yield _more_seeds(first[UNRELIABLE])
    reliable = [a for a in amounts if not {EXPLODED, UNDER, UNRELIABLE} & set(against[a.step])]
    unstable = [a.step for a in reliable if UNSTABLE in against[a.step]]
    if unstable:
        yield f"unstable at {_steps(unstable)}: {CLOSER}, or lower the learning rate"
    rough = [a.step for a in reliable if ROUGH in against[a.step]]
    if rough:
        yield f"not metasmooth at {_steps(rough)}: lower the learning rate, or use precision: float64"


def _lift(drowned: Sequence[Amount]) -> str:
    """What lifts effects out of rounding: a heavier removal only if it measures the same effect."""
    weights = {pair.weight for a in drowned for pair in a.linear}
    exact = [w for w in weights if all(any(p.weight == w and p.exact for p in a.linear) for a in drowned)]
    if not exact:
        return "use precision: float64, more steps, or groups" + (
            " (not removal_weight: effects are not linear in it)" if weights else ""
        )
    times = f"{max(exact):g} times the removal_weight (of removal_mode: reweight)"
    return f"use precision: float64, or {times}, in which effects are linear there"


def _more_seeds(unreliable: Sequence[Amount]) -> str:
    enough = [a.enough for a in unreliable if a.enough is not None]
    where = f"unreliable at {_steps([a.step for a in unreliable])}"
    if all(a.reliability is None for a in unreliable):
        return f"{where}: nothing is known of the noise; use more seeds (and two removals at least)"
    if not enough:
        return (
            f"{where}: no number of seeds that was extrapolated to is enough; larger groups, or removal_mode: reweight"
        )
    [at] = [a for a in unreliable if a.enough == min(enough)][:1]
    return (
        f"{where}: {min(enough)} seeds are enough for a reliability of {RELIABLE} at step {at.step}, by extrapolation"
    )


def _steps(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else "steps " + ", ".join(map(str, steps))
