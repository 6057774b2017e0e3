"""What the pool hands to Ray, and what it makes of Ray's errors: a Ray that only takes notes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from fimo.orchestrator.run import pool
from fimo.orchestrator.run.results import Failed, Lost
from fimo.orchestrator.spec.spec import Resources


class Reference:
    """Stands for an object of Ray's store."""


@dataclass(frozen=True)
class Told:
    """A manifest as far as the pool reads it."""

    spec: Any
    removals: tuple[str, ...] = ("a", "b")


class RayError(Exception):
    """Ray's own."""


class RayTaskError(RayError):
    """As Ray wraps what a task has raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class NotedRay:
    """Keeps what tasks are given; ``get`` raises ``error``."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self) -> None:
        self.given, self.error = list[Any](), Exception()

    def put(self, value: object) -> Reference:
        return Reference()

    def remote(self, **options: object) -> Any:
        return lambda function: SimpleNamespace(remote=self._take)

    def get(self, reference: object) -> Any:
        raise self.error

    def _take(self, *arguments: object) -> object:
        self.given.append(arguments)
        return object()


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Any:
    ray = NotedRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(pool, "NodeWatch", lambda: SimpleNamespace(nodes=[], stop=list))
    return ray, pool.RayPool({"a": "sweep"}, Told(SimpleNamespace(resources=Resources())), b"model")  # type: ignore[arg-type]


def test_no_argument_of_a_task_is_a_reference_for_which_ray_would_look_for_a_node(noted: Any) -> None:
    """Ray asks a node that holds an argument's bytes for a worker: one that has frozen never answers."""
    ray, opened = noted
    opened.submit("task")
    [given] = ray.given
    assert not [argument for argument in given if isinstance(argument, Reference)]
    assert [type(inside) for argument in given if isinstance(argument, list) for inside in argument] == [Reference] * 2


def test_what_a_task_could_not_fetch_is_lost_and_its_own_error_is_a_failure(noted: Any) -> None:
    ray, opened = noted
    for cause, kind in ((RayError("the object is gone"), Lost), (ValueError("theirs"), Failed)):
        ray.error = RayTaskError(cause)
        assert isinstance(opened._result(Reference()), kind), cause
