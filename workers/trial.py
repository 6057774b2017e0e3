"""One comparison of the engine with the definition: the same cells in one precision, in stacks of several sizes.

Two numbers are equal if they differ by no more than rounding does. Rounding is measured: the definition is run again
from θᶠ moved by a few units in the last place. In float64 a relative 1e-8 of the largest effect is granted besides,
which shows what float32 would hide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fimo.workers.amounts import Removal
from fimo.workers.definition import train_cell
from fimo.workers.errors import FimoError, WorkloadError
from fimo.workers.forward import largest
from fimo.workers.further_training import further_train
from fimo.workers.settings import Evaluate, FurtherTraining
from fimo.workers.shard import out_of_memory
from fimo.workers.stacking.replay import Graphs
from fimo.workers.start import Engine, Start
from fimo.workers.workload import Workload

ULPS = 4.0
"""Units in the last place that θᶠ is moved by to measure rounding."""
SLACK = 16.0
"""Times that measured rounding by which the engine may differ: it rounds at every step, and in another order."""
LENIENT = 16 * SLACK
"""The same where float64 has shown the engine to be right: chaos in float32 is measured by a few cells alone."""
RELATIVE = {"float64": 1e-8, "float32": 1e-6}
"""The least bound: as a share of the largest effect in float64, of the largest delta in float32."""


@dataclass(frozen=True)
class Case:
    """What is to be proven.

    Attributes:
        workload, state, settings: the sweep's; ``evals``: its number of evaluation examples.
        device: where.
        removals: the sweep's.
        seed: the sweep's first.
        replicas: the stack size; ``shards``: the numbers of removals in a part.
        joint: the sizes of stacks of several seeds; none if there are none.
    """

    workload: Workload
    state: Mapping[str, Tensor] | None
    settings: FurtherTraining
    evals: int
    device: torch.device
    removals: Sequence[Removal]
    seed: int
    replicas: int
    shards: Sequence[int]
    joint: Sequence[int] = ()


def where(case: Case, start: Start) -> dict[str, Any]:
    """What the definition must be told to train where the engine does."""
    return {"state": case.state, "device": case.device, "evals": case.evals, "forward": start.forward}


def moved_state(start: Start, ulps: float = ULPS, seed: int = 0) -> dict[str, Tensor]:
    """θᶠ moved at random (``seed``) by up to ``ulps`` units in the last place of the precision, as a state dict."""
    model, generator = start.model, torch.Generator().manual_seed(seed)
    unit = ulps * torch.finfo(model.dtype).eps
    state: dict[str, Tensor] = model.module.state_dict(keep_vars=True)
    moved: dict[int, Tensor] = {}
    for name, p in model.module.named_parameters():
        if name in model.params:
            sign = torch.rand(p.shape, generator=generator, dtype=torch.float64) * 2 - 1
            moved[id(p)] = p.detach() * (1 + unit * sign).to(p)
    # By identity: a tied weight goes by two names.
    return {name: moved.get(id(tensor), tensor.detach()) for name, tensor in state.items()}


@dataclass(frozen=True)
class Differences:
    """How far the engine is from the definition, each the largest over cells, steps and evaluation examples.

    Attributes:
        deltas, effects: the differences; ``bound``: what they may be at the step where they come nearest to it.
        scale: the largest effect; ``rounding``: what moving θᶠ by a few units in the last place does to a delta.
        line: the worst place in words.
    """

    equal: bool
    deltas: float
    effects: float
    bound: float
    scale: float
    rounding: float
    line: str

    def json(self) -> dict[str, float]:
        """The numbers."""
        return {
            "deltas": self.deltas,
            "effects": self.effects,
            "bound": self.bound,
            "largest_effect": self.scale,
            "rounding": self.rounding,
        }


SEEDS = 2
"""Of those after the first, whose baseline and first removal are compared where seeds are trained together."""


class Trial:
    """The definition's deltas in one precision, and the engine held against them.

    Attributes:
        cells: (removal, seed) of what is compared: those of the first seed, then two of each of the others.
        own: how many are of the first seed; their first is the baseline.
    """

    def __init__(self, case: Case, start: Start, cells: list[Removal], steps: list[int]) -> None:
        self.case, self.start, self.own = case, start, len(cells)
        self.precision = start.settings.precision
        self.settings = replace(start.settings, epochs=None, steps=steps[-1], evaluate=Evaluate(at_steps=tuple(steps)))
        others = range(case.seed + 1, case.seed + 1 + SEEDS) if case.joint else ()
        self.cells = [(cell, case.seed) for cell in cells] + [(cell, seed) for seed in others for cell in cells[:2]]
        self.plain = torch.stack([self._train(cell, seed, case.state) for cell, seed in self.cells])
        moved = moved_state(start)
        again = [self._train(cell, case.seed, moved) for cell in cells[:2]]
        # (T,): by how much rounding alone moves a delta, at the worst evaluation example.
        self.rounding = (torch.stack(again) - self.plain[:2]).abs().nan_to_num(torch.inf).amax(dim=(0, 2))

    def _train(self, cell: Removal, seed: int, state: Mapping[str, Tensor] | None) -> Tensor:
        how = where(self.case, self.start) | {"state": state}
        try:
            return train_cell(self.case.workload, self.settings, cell, seed, **how).deltas
        except FimoError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            removed = f"without {list(cell)}" if cell else "on everything"
            line = (str(error).strip().splitlines() or [""])[0]
            raise WorkloadError(
                f"further training {removed} fails in plain torch too: {type(error).__name__}: {line}"
            ) from error

    def differences(
        self,
        engine: Engine,
        stacks: Sequence[int],
        slack: float = SLACK,
        optional: bool = False,
        joint: Sequence[int] = (),
    ) -> Differences:
        """The largest differences over the given stack sizes; a way that cannot be gone at all is unequal.

        Args:
            joint: sizes of stacks of several seeds.
            slack: how many times the measured rounding is granted.
            optional: raise MemoryError if memory runs out, rather than call the way unequal.
        """
        try:
            results = list(self._by_engine(engine, stacks, joint))
        except FimoError:
            raise
        except Exception as error:
            if optional and out_of_memory(error):
                raise MemoryError from error
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return Differences(False, torch.inf, torch.inf, 0.0, 0.0, 0.0, text[:200])
        return min((self._compare(*result, slack) for result in results), key=lambda d: (d.equal, -d.effects))

    def _by_engine(
        self, engine: Engine, stacks: Sequence[int], joint: Sequence[int]
    ) -> Iterator[tuple[int, list[int], Tensor]]:
        """(stack size, places among the cells, deltas) for stacks that hold the cells, filled up to their size."""
        start = self.start.using(engine)
        # Graphs of its own: what is compared is traced here, as in a fresh process.
        start = replace(start, settings=self.settings, graphs=None if start.graphs is None else Graphs())
        count = self.own
        for size in stacks:
            for begin in range(0, count, size):
                if size == 1 and engine.stack and begin not in (0, count - 1):
                    continue  # of cells that are alone, the baseline and the one that acts at once
                # The cells over and over: what is wrong in one lane alone must not be a lane that nobody looks at.
                yield size, *self._stack(start, [place % count for place in range(begin, begin + size)])
        several = [0, 1, *range(count, len(self.cells))]
        for size in joint if start.joins else ():
            # Seed by seed, as whole shards stand in a stack.
            yield size, *self._stack(start, sorted(several[place % len(several)] for place in range(size)))

    def _stack(self, start: Start, places: list[int]) -> tuple[list[int], Tensor]:
        lanes, seeds = zip(*(self.cells[place] for place in places), strict=True)
        return places, further_train(start, lanes, seeds).deltas

    def _compare(self, size: int, places: list[int], got: Tensor, slack: float) -> Differences:
        baselines = [self._baseline(place) for place in places]
        plain, base = self.plain[places], self.plain[baselines]
        scale, delta = largest(self.plain[: self.own] - self.plain[:1]), largest(self.plain)
        least = RELATIVE[self.precision]
        rounding = slack * self.rounding
        off = _off(got, plain).amax(dim=2)
        # An effect is small beside its deltas. If the stack holds the baseline, it is compared for itself.
        held = {place: lane for lane, place in reversed(list(enumerate(places)))}
        got_base = torch.stack([got[held[place]] if place in held else self.plain[place] for place in baselines])
        off_effects = _off(got - got_base, plain - base).amax(dim=2)
        bound = rounding + least * (scale if self.precision == "float64" else delta)
        equal = bool((off <= rounding + least * delta).all()) and bool((off_effects <= bound).all())
        lane, step = divmod(int(off_effects.argmax()), off_effects.shape[1])
        (removal, seed), steps = self.cells[places[lane]], self.settings.evaluate.at_steps or ()
        what = f"the effect of removing {list(removal)}" if removal else "the baseline"
        stack = f"a stack of {size}" if set(places) <= set(range(self.own)) else f"a stack of {size} of several seeds"
        line = (
            f"{what} of seed {seed} is off by {float(off_effects.max()):.2g} (effects up to {scale:.2g}) after step "
            f"{steps[step]}, in {stack}, in {self.precision}"
        )
        rounded = float(self.rounding.max())
        return Differences(equal, float(off.max()), float(off_effects.max()), float(bound.max()), scale, rounded, line)

    def _baseline(self, place: int) -> int:
        """Where the baseline of a cell's seed is."""
        return 0 if place < self.own else place - (place - self.own) % 2


def _off(a: Tensor, b: Tensor) -> Tensor:
    """|a − b|; 0 if both are not finite (both diverged), infinite if one is."""
    both = ~a.isfinite() & ~b.isfinite()
    return torch.where(both, 0.0, (a - b).abs()).nan_to_num(torch.inf, torch.inf, torch.inf)
