"""``fimo verify`` for people."""

from __future__ import annotations

from collections.abc import Iterator

from fimo.orchestrator.run.rerun import Rerun
from fimo.orchestrator.run.verification import Verification


def verification_lines(verification: Verification) -> Iterator[str]:
    """What was read, what is wrong with it, what each device's noise is, and how each cell trained again came out."""
    v = verification
    yield f"{v.sweep}: {v.parts} parts and {v.blocks} blocks of estimates read, {len(v.bad)} bad"
    lacking = {"estimators": v.owed, "witnesses": v.witnesses}
    there = [f"{v.done} of {v.cells} cells there", *(f"{n} {what} missing" for what, n in lacking.items() if n)]
    yield ", ".join(there if v.settled else [*there, "more seeds may come"])
    yield from (f"bad: {line}; `fimo resume {v.sweep}` computes it again" for line in v.bad)
    if v.diverged:
        yield f"{v.diverged} results are not finite: lower the learning rate or clip"
    for name, device in sorted(v.devices.items()):
        drift = f", baselines differ from other devices' by {device.drift:.3g}" if device.drift else ""
        yield f"{name}: {device.parts} parts, noise floor {device.floor:.3g}{drift}"
    yield from (_rerun_line(rerun) for rerun in v.reruns)


def _rerun_line(r: Rerun) -> str:
    how = "the same bits" if r.identical else f"differs by {r.difference:.3g} of the tolerance"
    wanted = "" if r.ok or not r.exact else ", and the same bits are due on the same device and versions"
    other = "" if r.device == r.here else f" ({r.device}, trained again on {r.here})"
    plain = f"; {r.definition:.2g} of measured rounding from the definition"
    return f"{'ok' if r.ok else 'WRONG'}: seed {r.seed}, removal {r.removal}: {how}{wanted}{other}{plain}"
