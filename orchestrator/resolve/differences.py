"""What has changed between two resolutions of a spec, in words: pure functions of digests and manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fimo.orchestrator.sweep.manifest import Manifest

PARTS = {
    "source": "the workload's code",
    "train": "the training examples",
    "evals": "the evaluation examples",
    "architecture": "the model's architecture or settings",
    "final_model": "the final model's parameters or buffers",
}
"""What a number depends on, beside what the spec says, by the names of ``Digests.about``."""

UNSTABLE = (
    "they must be the same whenever and wherever the workload is loaded: seed what it draws (torch.manual_seed, a "
    "numpy generator), sort what it reads from folders and sets, and keep its files the same everywhere"
)


def what_differs(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The parts whose digests differ, in words; none if either is from before they were recorded."""
    return [words for part, words in PARTS.items() if part in one and part in other and one[part] != other[part]]


def in_words(parts: Sequence[str]) -> str:
    """Several in a line: \"a\", \"a and b\", \"a, b and c\"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def since(was: Manifest, now: Manifest) -> list[str]:
    """What a result depends on that has changed from one manifest to another, in words.

    Empty if the digests are equal, or if what has changed was not recorded.
    """
    if was.digest == now.digest:
        return []
    changed = [
        f"{name} ({_shown(old)}, now {_shown(new)})"
        for name, old, new in (
            ("workload", was.spec.workload, now.spec.workload),
            ("workload_args", was.spec.workload_args, now.spec.workload_args),
        )
        if old != new
    ]
    parts = what_differs(dict(was.about), dict(now.about))
    if was.evals != now.evals and PARTS["evals"] in parts:
        parts[parts.index(PARTS["evals"])] = f"the number of evaluation examples ({was.evals}, now {now.evals})"
    before, after = (m.spec.further_training.model_dump(mode="json") for m in (was, now))
    return changed + parts + _changed_keys("further_training", before, after)


def _changed_keys(path: str, was: Any, now: Any) -> list[str]:
    """The keys of a section whose values differ, each with both."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*was, *now])
        return [line for key in keys for line in _changed_keys(f"{path}.{key}", was.get(key), now.get(key))]
    return [] if was == now else [f"{path} ({_shown(was)}, now {_shown(now)})"]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"
