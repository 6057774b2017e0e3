"""A store that fails at chosen moments, and a place to run where every task is a process that may be killed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fimo.orchestrator.run.driver import Where
from fimo.orchestrator.run.places import LocalPool
from fimo.orchestrator.run.results import Failed, Lost, Receipt, Result
from fimo.orchestrator.run.tasks import run_task
from fimo.orchestrator.run.work import Task
from fimo.orchestrator.store import Entry, Store
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import StoreError

KINDS = ("refused", "answer_lost", "killed_before", "killed_after")
"""Before or after the operation took effect: an error of the store, or the end of the whole process."""


class Killed(BaseException):
    """The process ends here: nothing that fimo writes may catch this."""


class FaultyStore:
    """A store whose N-th operation fails as ``plan`` says; ``done`` counts the faults that happened."""

    def __init__(self, inner: Store, plan: Mapping[int, str]) -> None:
        self.inner, self.plan = inner, plan
        self.operations, self.done = 0, 0

    @property
    def uri(self) -> str:
        return self.inner.uri

    def _do(self, operation: Callable[[], Any]) -> Any:
        kind = self.plan.get(self.operations)
        self.operations += 1
        self.done += kind is not None
        if kind == "refused":
            raise StoreError("planned: refused")
        if kind == "killed_before":
            raise Killed
        result = operation()
        if kind == "answer_lost":
            raise StoreError("planned: the answer is lost")
        if kind == "killed_after":
            raise Killed
        return result

    def create(self, key: str, data: bytes) -> bool:
        made: bool = self._do(lambda: self.inner.create(key, data))
        return made

    def put(self, key: str, data: bytes) -> None:
        self._do(lambda: self.inner.put(key, data))

    def get(self, key: str) -> bytes:
        data: bytes = self._do(lambda: self.inner.get(key))
        return data

    def list(self, prefix: str) -> Iterator[Entry]:
        entries: Iterator[Entry] = self._do(lambda: self.inner.list(prefix))
        return entries

    def delete(self, key: str) -> None:
        self._do(lambda: self.inner.delete(key))

    def check(self) -> None:
        self._do(self.inner.check)


def forked(chances: Callable[[], Callable[[], None] | None]) -> Where:
    """A place where each task is a forked process.

    Args:
        chances: asked for each task; what it returns is called in the new process before the task begins and may
            arrange its death; None lets the task live.
    """

    @contextmanager
    def where(sweep: Sweep, manifest: Manifest, final_model: bytes | None) -> Iterator[ForkedPool]:
        yield ForkedPool(lambda task: run_task(sweep, manifest, final_model, task), chances)

    return where


class ForkedPool(LocalPool):
    """One process at a time; a process that dies by a signal is a lost task."""

    def __init__(self, work: Callable[[Task], Receipt], chances: Callable[[], Callable[[], None] | None]) -> None:
        super().__init__(work)
        self._chances = chances

    def _run(self, task: Task) -> Result:
        answer = in_fork(lambda: self._work(task), self._chances())
        if answer is None:
            return Lost("the process was killed")
        return answer


def in_fork(work: Callable[[], Any], doom: Callable[[], None] | None = None) -> Any:
    """``work()`` in a forked process; None if it was killed."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            receiver.close()
            if doom is not None:
                doom()
            try:
                answer = work()
            except Exception as error:
                answer = Failed(error, traceback.format_exc())
            sender.send_bytes(pickle.dumps(answer))
            code = 0
        finally:
            os._exit(code)
    sender.close()
    try:
        data = receiver.recv_bytes()
    except EOFError:
        data = None
    finally:
        receiver.close()
    _, status = os.waitpid(pid, 0)
    if data is None:
        assert os.WIFSIGNALED(status), status
        assert os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM), status
        return None
    return pickle.loads(data)


def die_after(seconds: float) -> Callable[[], None]:
    """The kernel ends the process at any instruction; to be called in the process that is to die."""

    def arm() -> None:
        # Without a handler SIGALRM ends a process as SIGKILL does, and this timer can hit no other process.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-4))

    return arm


def die_at_commit(name: str, number: int, before: bool) -> Callable[[], None]:
    """SIGKILL at the ``number``-th call of ``os.<name>`` (``fsync``, ``link``): in the middle of a commit."""

    def arm() -> None:
        real, calls = getattr(os, name), [0]

        def deadly(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == number and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **options)
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, deadly)

    return arm
