"""Whether the changes that a linearised training carries are still made of what the removals put into them.

Along a trajectory whose steps do not amplify, ‖δ_s‖ is at most what the removal's own changes of the steps add up to,
momentum included: each step's direct response ρ_s = ‖U_s's answer to ∇q_s alone‖ goes on at the optimizer's momentum β,

    a_s = β a_{s−1} + ρ_s,    B_s = B_{s−1} + a_s.

Beyond a learning rate of 2/sharpness ‖δ_s‖ / B_s grows: the change is then of the sharpest direction and of nothing
else, where the run itself goes elsewhere. ``BEYOND`` tells, and ``WITHIN`` says from which step on. Both were chosen on
MLPs of two to six layers (SGD with and without momentum, batches of 8 to 691, every removal mode, trained and not).
Where the rate was well below, the largest ratio of any removal fell from 1 and never passed 1.04. Above, the root mean
square passed 1.1 within a few steps (tens with momentum), about when the cosine to the same seeds' runs fell. Not told:
a rate a third above, where the run left the sharp direction again by itself and the ratio stayed under 1.1, though its
values were lost by step 9; and a gradient that jumps (ReLU).

Where the optimizer is not linear, B_s is the path of a change without curvature instead, both in the sum of absolute
entries, and the ratio is of all removals together: Adam's steps contract on the whole, not each removal. At AdamW 5e-4
it stayed under 1.05 up to 500 steps, but for one jump to 3.5 that was no fault (Adam steps by signs where a gradient
wakes). At ten times the rate, where the runs' own seeds no longer agree after 100 steps, it passed 2; at forty times
15. So the bound is wide and late: it tells a runaway, not where Adam's values stop to mean something, which the
reliability of the gold standard says.
"""

from __future__ import annotations

import torch
from torch import Tensor

BEYOND = 1.1
"""Times B_s that changes do not reach where training is stable."""

BEYOND_TOGETHER = 10.0
"""The same where the optimizer is not linear, and B_s no strict bound."""

WITHIN = 1.001
"""Times B_s up to which changes that later go ``BEYOND`` are still sound; above 1 by rounding."""


class Growth:
    """‖δ_s‖ / B_s, step by step.

    Attributes:
        onset: the first step whose changes are not to be trusted, None = there is none yet.
        ratio: after the last step taken; the root mean square over the removals, or that of their norms together.
    """

    def __init__(self, removals: int, momentum: float, together: bool) -> None:
        self.onset: int | None = None
        self.ratio = 0.0
        self._momentum, self._together, self._sound = momentum, together, 0
        self._going, self._reach = (torch.zeros(removals, dtype=torch.float64) for _ in range(2))

    def take(self, number: int, changes: Tensor, responses: Tensor) -> None:
        """Step ``number``: ‖δ‖ after it and the direct responses ρ, (R,) each, in one norm."""
        changes, responses = (norms.detach().to("cpu", torch.float64) for norms in (changes, responses))
        self._going = self._momentum * self._going + responses
        self._reach = self._reach + self._going
        begun = (self._reach > 0) | (changes != 0)
        if not bool(begun.any()):
            return
        changes, reach = changes[begun], self._reach[begun]
        ratio = changes.norm() / reach.norm() if self._together else (changes / reach).square().mean().sqrt()
        self.ratio = float(ratio)
        if self.ratio <= WITHIN:
            self._sound = number
        # A change that is not finite is beyond every bound.
        if self.onset is None and not self.ratio <= (BEYOND_TOGETHER if self._together else BEYOND):
            self.onset = self._sound + 1
