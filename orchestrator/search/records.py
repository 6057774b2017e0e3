"""What a search has tried, as objects of its sweep: one for each point, written when it is done.

Resuming is reading them. An object that is torn, altered, or of another search counts as absent, and is replaced.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fimo.orchestrator.spec.canonical import canonical, digest
from fimo.orchestrator.store import NotFound
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.sweep import Sweep


@dataclass(frozen=True)
class Records:
    """The objects of one search on a sweep.

    Attributes:
        digest: of all that their numbers depend on beside the point, 64 hex digits.
    """

    sweep: Sweep
    digest: str

    def _key(self, point: str, seeds: int | None, decision: bool) -> str:
        return keys.search(self.sweep.name, self.digest, point, seeds, decision)

    def read(self, point: str, seeds: int | None = None, decision: bool = False) -> dict[str, Any] | None:
        """What is recorded of a point (64 hex digits); None if nothing is, or nothing that verifies."""
        try:
            body = json.loads(self.sweep.store.get(self._key(point, seeds, decision)))
        except (NotFound, ValueError, RecursionError):
            return None
        if not isinstance(body, dict) or body.keys() != {"of", "values", "digest"}:
            return None
        values = body["values"]
        right = (self._of(point, seeds, decision), self._sum(point, seeds, decision, values))
        return values if (body["of"], body["digest"]) == right and isinstance(values, dict) else None

    def write(self, point: str, values: dict[str, Any], seeds: int | None = None, decision: bool = False) -> None:
        """Record a point; raises StoreError, and ValueError if a number is not finite."""
        total = self._sum(point, seeds, decision, values)
        body = {"of": self._of(point, seeds, decision), "values": values, "digest": total}
        self.sweep.store.put(self._key(point, seeds, decision), canonical(body).encode())

    def _of(self, point: str, seeds: int | None, decision: bool) -> list[Any]:
        return [self.digest, point, seeds, decision]

    def _sum(self, point: str, seeds: int | None, decision: bool, values: Any) -> str:
        return digest([self._of(point, seeds, decision), values])
