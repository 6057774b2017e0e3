"""A reduction shared among processes of this machine, where parts are many.

Each process has a share of the recorded steps (``tables/shares.py``), so that tables are the same bytes however many
there are. Seeds go round in rounds: while the processes reduce those of one round, each reads a seed of the next.
Memory does not grow with the number of seeds: effects lie in a file without a name that all map, with room for two
rounds. A process that dies loses nothing: the store still has every part, and this process does it alone.

Not by blocks of evaluation examples: their scores are summed, and a sum of sums has other last bits.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler
from typing import IO, Any

from fimo.orchestrator.run.reading import Costs, Gathered, seed_blocks
from fimo.orchestrator.run.share import Add, Begin, Finish, Found, Read, main
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Listed, Sweep
from fimo.orchestrator.tables.shares import Course, Presence, Reduced, joined, reduced, spans
from fimo.workers.errors import FimoError
from fimo.workers.memory import keep_freed_memory

Say = Callable[[str], None]

EACH = 256 * 2**20
"""Bytes of parts for which a process is worth starting."""
MOST = 16
"""Processes at most."""
ROOM = 2 * 2**30
"""Bytes of seeds' effects that are held at once, at most; two seeds at least."""
END_S = 10.0
"""Seconds that a process has to end in."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class LostError(Exception):
    """A process has died, or cannot be started: in one line, for whoever waits."""


def suited(listed: Sequence[Listed]) -> int:
    """How many processes a reduction of these parts is worth on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(sum(one.size for one in listed) // EACH, cores, MOST))


def reduce_parts(
    sweep: Sweep,
    manifest: Manifest,
    listed: Sequence[Listed],
    course: Course,
    gathered: Gathered,
    costs: Costs,
    say: Say,
    processes: int | None = None,
) -> Reduced:
    """Read and verify every part, and reduce and score the seeds; the same bytes whatever the number of processes.

    Args:
        gathered, costs: note what is met.
        processes: None = as many as are worth it.

    Raises:
        StoreError: the store cannot be read.
    """
    keep_freed_memory()
    count = len(spans(course, suited(listed) if processes is None else processes))
    if count > 1 and not isinstance(sweep.store, MemoryStore):
        met, rows = Gathered({}), Costs()
        try:
            found = _shared(sweep, manifest, listed, course, met, rows, say, count)
        except LostError as lost:
            say(f"{lost}; this process reduces alone")
        else:
            gathered.gone += met.gone
            gathered.bad += met.bad
            gathered.done += met.done
            costs += rows
            return found
    return reduced(seed_blocks(sweep, manifest, listed, gathered, costs, say), course)


def _shared(
    sweep: Sweep,
    manifest: Manifest,
    listed: Sequence[Listed],
    course: Course,
    met: Gathered,
    costs: Costs,
    say: Say,
    count: int,
) -> Reduced:
    by_seed: dict[int, list[Listed]] = {}
    for item in listed:
        by_seed.setdefault(item.seed, []).append(item)
    seeds, presence = sorted(by_seed), Presence(course)
    together = max(1, min(count, ROOM // max(1, 2 * course.whole)))
    shape = course.removals, len(course.steps), course.evals
    with contextlib.ExitStack() as opened:
        memory = opened.enter_context(_memory(2 * together * course.whole))
        crew = [opened.enter_context(_started(memory)) for _ in range(count)]
        for one, steps in zip(crew, spans(course, count), strict=True):
            one.tell(Begin(sweep, manifest, course.at(steps), steps, 2 * together, shape))
        adding: list[Found] = []
        for first in range(0, len(seeds) + together, together):
            # What is long is told to those alone that wait for it: two that send to each other would wait for ever.
            if adding:
                _tell_all(crew, Add(adding))
            now, slot = seeds[first : first + together], first % (2 * together)
            for place, seed in enumerate(now):
                crew[place].tell(Read(by_seed[seed], slot + place))
            for one in crew if adding else ():
                one.answer()
            adding = []
            for place, seed in enumerate(now):
                found: Found = crew[place].answer()
                met.gone += found.gone
                met.bad += found.bad
                met.done += found.done
                costs += found.costs
                say(f"reducing seed {seed} ({first + place + 1} of {len(seeds)})")
                if found.block is not None:
                    presence.add(found.block)
                    adding.append(found)
        _tell_all(crew, Finish(presence.everywhere))
        return joined([one.answer() for one in crew])


class _Process:
    """The other side of a process."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self._process, self._connection = process, connection

    def tell(self, what: object) -> None:
        self.send(_pickled(what))

    def send(self, data: Any) -> None:
        try:
            self._connection.send_bytes(data)
        except (OSError, ValueError) as error:
            raise self._lost() from error

    def answer(self) -> Any:
        """What it answers, in the order in which it was told."""
        try:
            answer = self._connection.recv()
        except Exception as error:
            # Whatever is wrong with what came: the connection is of no more use.
            raise self._lost() from error
        if isinstance(answer, MemoryError):
            raise LostError("a process that shares in the reduction has no memory left")
        if isinstance(answer, FimoError):
            raise answer
        if isinstance(answer, Exception):
            line = (str(answer).strip().splitlines() or [""])[0]
            raise LostError(f"a process that shares in the reduction failed ({type(answer).__name__}: {line})")
        return answer

    def _lost(self) -> LostError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        return LostError(f"a process that shares in the reduction has died (exit status {self._process.poll()})")


def _tell_all(crew: Sequence[_Process], what: object) -> None:
    data = _pickled(what)
    for one in crew:
        one.send(data)


def _pickled(what: object) -> Any:
    try:
        return ForkingPickler.dumps(what)
    except Exception as error:
        raise LostError(f"the sweep cannot be given to another process ({type(error).__name__})") from error


@contextlib.contextmanager
def _started(memory: IO[bytes]) -> Iterator[_Process]:
    """A process that ends with the body, however that ends.

    Not of ``multiprocessing``, whose children run the caller's script again if it has no guard. In a session of its
    own: an interrupt is for this process to hear, whose end closes the connection.
    """
    own, other = Pipe()
    with own:
        with other:
            process = _process(other.fileno(), memory.fileno())
        try:
            yield _Process(process, own)
        except BaseException:
            process.kill()
            raise
        finally:
            own.close()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _process(connection: int, memory: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {main.__module__} import main; main({connection}, {memory})"],
            pass_fds=(connection, memory),
            env=os.environ | ONE_THREAD,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise LostError(f"no process can be started to share in the reduction ({error.strerror})") from error


@contextlib.contextmanager
def _memory(size: int) -> Iterator[IO[bytes]]:
    """A file without a name, in memory where the system has such."""
    with os.fdopen(os.memfd_create("fimo"), "r+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile() as file:
        file.truncate(size)
        yield file
