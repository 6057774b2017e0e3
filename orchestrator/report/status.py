"""What ``fimo status`` prints; text only, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fimo.orchestrator.report.course import course_lines
from fimo.orchestrator.report.show import duration, size
from fimo.orchestrator.report.trust import trust_lines


def proof_line(proof: Mapping[str, Any]) -> str:
    """A verdict on the engine for people."""
    if "refused" in proof:
        return f"engine refused on {proof.get('device')}: {proof['refused']}"
    differences = [
        f"{numbers.get('effects') or 0:.1e} in {precision}"
        for precision, numbers in sorted(dict(proof.get("precisions", {})).items(), reverse=True)
    ]
    given_up = "".join(f"; given up: {line}" for line in proof.get("lines", ()))
    return (
        f"engine proven on {proof.get('device')}: {proof.get('path')}, {proof.get('replicas')} cells together; effects "
        f"differ from the definition's by at most {', '.join(differences)}{given_up}"
    )


def driver_lines(driver: Mapping[str, Any]) -> list[str]:
    """What a driver said of itself, and whether it is still heard."""
    who = f"driver on {driver.get('host')} (process {driver.get('pid')})"
    age = duration(driver["age_s"])
    if driver["silent"]:
        return [f"{who}: not heard for {age}: it has most likely ended"]
    return [f"{who}, heard {age} ago:", *(f"  {line}" for line in course_lines(driver))]


def status_lines(status: dict[str, Any]) -> list[str]:
    """``fimo status`` for people."""
    lines = [
        *status["warnings"],
        f"{status['sweep']}: {status['done']} of {status['cells']} cells done, {status['missing']} missing",
        f"seeds: {status['seeds_complete']} of {status['seeds']} whole, {status['seeds_begun']} begun",
        f"{status['parts']} parts, {size(status['part_bytes'])}",
    ]
    if others := status.get("parts_of_others"):
        lines.append(
            f"{others} parts of another digest lie here: they are of a sweep of this name that this one has replaced, "
            "or sweep.json is not the one that they were made under"
        )
    if status["last_commit_age_s"] is not None:
        pace = status["parts_per_minute"]
        lines.append(
            f"last commit {duration(status['last_commit_age_s'])} ago"
            + (f", {pace:.1f} parts a minute" if pace else "")
            + (f", done in about {duration(status['finish_in_s'])}" if status["finish_in_s"] else "")
        )
    for driver in status["drivers"]:
        lines += driver_lines(driver)
    if status["estimates_missing"]:
        lines.append(f"estimators still to run: {', '.join(status['estimates_missing'])}")
    if status["witnesses_missing"]:
        lines.append(f"{status['witnesses_missing']} witnesses of the noise floor still to train")
    lines += [f"no witnesses of seed {seed}: {why}" for seed, why in status["witnesses_left_out"].items()]
    lines += [f"{name} is left out of the default estimators: {why}" for name, why in status["left_out"].items()]
    lines += [proof_line(proof) for proof in status["proofs"]]
    lines += trust_lines(status["reliability"])
    if status["failed"]:
        lines.append(f"{len(status['failed'])} tasks set aside; the first: {status['failed'][0]}")
    if status["complete"]:
        lines.append("complete")
    elif status["estimated_only"]:
        store = status["sweep"].rpartition("/")[0]
        lines.append(f"estimated only: `fimo run SPEC --store {store}` trains its cells")
    elif status["resumable"]:
        lines.append(f"incomplete: `fimo resume {status['sweep']}` computes the rest")
    else:
        lines.append("incomplete: all that is missing was set aside")
    return lines
