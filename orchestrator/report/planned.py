"""What ``fimo plan`` prints: a sweep's size, its faults and its cost; text only, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fimo.orchestrator.report.show import duration, label, labels, size, spread
from fimo.orchestrator.run.placement import idle_line
from fimo.orchestrator.spec.spec import Seeds


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """``fimo plan`` for people."""
    there = f" ({plan['done']} there already)" if plan["done"] else ""
    witnesses = "witness" if plan["witnesses"] == 1 else "witnesses"
    weight = f" at weight {plan['removal_weight']:g}" if plan["removal_weight"] != 1 else ""
    lines = [
        f"{plan['name']}: {plan['removals']} removals × {plan['seeds']} seeds = {plan['cells']} cells{there}"
        f"{plan['until']}",
        f"{plan['shards']} shards to train, {plan['steps']} steps a cell, evaluated at {plan['amounts']} amounts on "
        f"{plan['evals']} evaluation examples; {plan['witnesses']} {witnesses} of the "
        f"noise floor, {plan['witness_share']:.0%} of the cost",
        f"{plan['scalars']} trainable scalars, {plan['train']} training examples, removal mode "
        f"{plan['removal_mode']}{weight}",
        f"about {size(plan['bytes'])} of rows before compression",
        f"estimators: {', '.join(plan['estimators']) or 'none'}",
        *(f"{name} is left out of the default estimators: {why}" for name, why in plan["left_out"].items()),
        *([f"EK-FAC's factors cover {plan['coverage']:.0%} of the trainable scalars"] if plan["coverage"] < 1 else []),
        *(["one removal: its effects are measured, and no score, which compares removals"] * (plan["removals"] == 1)),
        *([idle_line(plan["idle_gpus"], "this machine")] if plan["idle_gpus"] else []),
        f"digest {plan['digest'][:32]}",
    ]
    lines += unused_lines(plan["unused"])
    if "device_hours" in plan:
        lines += measured_lines(plan)
    if "rank" in plan:
        lines += rank_cost_lines(plan["rank"])
    return lines


def unused_lines(unused: Mapping[str, Any]) -> list[str]:
    """Why what the store holds of a sweep of this name is not used, for people."""
    if not unused:
        return []
    changed = " and ".join(unused["changed"]) or "something that a number depends on"
    return [
        f"the store's {unused['cells']} cells of this name are not used: since then changed {changed}",
        "  `fimo run` asks for another name, or --replace",
    ]


def measured_lines(plan: Mapping[str, Any]) -> list[str]:
    """What was timed, for people."""
    spent = plan["seconds"]
    shards, witnesses, load, start, proof = (
        short(spent[part]) for part in ("shards", "witnesses", "load", "start", "proof")
    )
    lines = [
        f"measured on this {plan['device']}: {plan['replicas']} cells together ({plan['engine']}), "
        f"{short(plan['seconds_per_cell'])} a cell",
        f"  shards {shards}, witnesses {witnesses}; before its first task a worker loads for {load} and prepares for "
        f"{start}, and the proof takes {proof}",
    ]
    names = labels((e["name"], e["params"]) for e in spent["estimators"])
    lines += [f"  estimator {names[e['name'], e['params']]}: {short(e['seconds'])}" for e in spent["estimators"]]
    lines += [f"  {label(d['name'], d['params'])} will be left out: {d['why']}" for d in plan["too_dear"]]
    return [
        *lines,
        f"what is missing takes {short(plan['device_seconds'])} of a device; `fimo run` about "
        f"{short(plan['wall_seconds'])} here, {plan['workers']} tasks at a time",
    ]


def short(seconds: float) -> str:
    """Seconds in two digits, in the unit that they are read in."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    return duration(seconds)


def until(seeds: Seeds) -> str:
    """That a sweep adds seeds by itself, for people; empty if it does not."""
    target = seeds.until_reliability
    return "" if target is None else f"; more seeds until a reliability of {target:g}, at most {seeds.max}"


def seeds_lines(found: Mapping[str, Any]) -> list[str]:
    """How many seeds a sweep needs, for people."""
    lines = [f"{found['sweep']}: {found['seeds']} seeds, {duration(found['device_seconds_per_seed'])} of a device each"]
    for name, most in found["wanted"].items():
        target = found["sem"] if name == "sem" else found["reliability"]
        what = "a root mean square standard error of" if name == "sem" else "a reliability of"
        rows = [r for r in found["steps"] if r["step"] in spread([r["step"] for r in found["steps"]])]
        told = ", ".join(f"{r['step']}: {'not reached' if r[name] is None else r[name]}" for r in rows)
        lines.append(f"seeds for {what} {target:g}, by step: {told}")
        if most is None:
            lines.append("  not reached at any step: the seeds do not agree with each other at all")
            continue
        hours = found["device_hours"][name]
        more = f"{short(3600 * hours)} of a device more" if most > found["seeds"] else "it has them"
        lines.append(f"  at every step that reaches it: {most} ({more})")
    return lines


def rank_cost_lines(cost: Mapping[str, Any]) -> list[str]:
    """What a ranking would take, for people."""
    lines = [
        f"to rank {cost['train']} training examples for {cost['evals']} evaluation examples on this {cost['device']}:"
    ]
    for named, hours in cost["ranking"].items():
        name, _, params = named.partition(" ")
        lines.append(f"  {label(name, params)}: {short(3600 * hours)} of a device")
    return [
        *lines,
        f"  verification: at most {cost['verify_cells']} cells, {short(3600 * cost['verify_hours'])} of a device",
    ]
