"""Every key of a sweep. Who writes what, and when:

    NAME/sweep.json                         the manifest: every run, before it computes anything (put)
    NAME/sets/DIGEST/SET.json               the removals called SET: a run, before the first task on them (create)
    NAME/parts/DIGEST/seed-N/SET.parquet    one shard's results: the worker that trained it (create, never replaced)
    NAME/witnesses/DIGEST/seed-N.parquet    a seed's cells trained again to measure the noise floor, as a part: the
                                            worker that trained them (create, never replaced)
    NAME/estimates/DIGEST/ESTIMATOR-PARAMS/SET-FIRST-COUNT.parquet
                                            an estimator's values: the worker that computed them (create); under
                                            …/ESTIMATOR-PARAMS/seed-N/ those of one seed that it trains with
    NAME/imported/SCORES.parquet            another library's values: `fimo import-scores` (put)
    NAME/replicas/DIGEST-DEVICE.json        measured stack size: the first worker of a device type (create);
                                            …-TOGETHER.json where a stack may hold so many shards
    NAME/proofs/DIGEST-DEVICE-ABOUT.json    how the engine compared with the definition: the first worker of a device
                                            type (and software), before its first shard (create)
    NAME/search/DIGEST/POINT.json           a point that `fimo search` has tried, with its scores; POINT-SEEDS.json a
                                            candidate with so many seeds: the worker that tried it (put); beside it
                                            POINT-SEEDS-decision.json, whether it goes on: the search (put)
    NAME/failed/TASK.json                   a task given up, with its error: a run, when its tasks end (put);
                                            removed by `--retry-failed`
    NAME/jobs/ID.json                       where a job was submitted: `fimo submit`, after the head took it (put)
    NAME/drivers/ID.json                    what a running driver does, for `fimo status`: that driver, now and then;
                                            deleted when it ends (put)
    NAME/claims/TASK-TURN.json              which driver computes a task now: that driver, before it starts it (create);
                                            deleted when the task has ended
    NAME/rejected/KEY                       an object that did not verify: a run, moved from its key (put, then delete)
    NAME/tables/TABLE.parquet               the tables: every run and import, after reducing (put);
                                            `ranking`: `fimo rank`; `search`, `search_training`: `fimo search`
    NAME/tables/made-from.json              the digest of what the tables were made from, written after them (put)

DIGEST is 32 hex digits of what the object depends on, SET 16 hex digits of removals. The parts that a listing shows
are the only truth about progress; a set is written before the parts that name it, so whoever lists parts can tell
which cells they hold. Pure functions of text: nothing here reads a store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache

from fimo.orchestrator.spec.canonical import digest
from fimo.orchestrator.spec.removals import NamedRemoval

_PART = re.compile(r"seed-(\d{10})/([0-9a-f]{16})\.parquet$")
_WITNESS = re.compile(r"seed-(\d{10})\.parquet$")
_BLOCK = re.compile(r"(?:seed-(\d{10})/)?([0-9a-f]{16})-(\d{8})-(\d{8})\.parquet")


def manifest(sweep: str) -> str:
    """What the last run resolved its spec to."""
    return f"{sweep}/sweep.json"


def set_hash(removals: Sequence[NamedRemoval]) -> str:
    """The name of a set of removals in keys: 16 hex digits over their numbers and indices."""
    return _set_hash(tuple(removals))


@lru_cache(maxsize=1024)
def _set_hash(removals: tuple[NamedRemoval, ...]) -> str:
    """Once for the shards of all seeds, which remove the same."""
    return digest([[r.number, list(r.indices)] for r in removals])[:16]


def removal_set(sweep: str, result_digest: str, name: str) -> str:
    """The removals of the set called ``name`` (see ``set_hash``)."""
    return f"{sweep}/sets/{result_digest[:32]}/{name}.json"


def parts(sweep: str, result_digest: str) -> str:
    """The prefix of all parts of a digest; they list by seed, then set."""
    return f"{sweep}/parts/{result_digest[:32]}/"


def all_parts(sweep: str) -> str:
    """The prefix of the parts of every digest."""
    return f"{sweep}/parts/"


def part(sweep: str, result_digest: str, seed: int, removals: Sequence[NamedRemoval]) -> str:
    """The part of one shard."""
    return f"{parts(sweep, result_digest)}seed-{seed:010d}/{set_hash(removals)}.parquet"


def read_part_key(key: str) -> tuple[int, str] | None:
    """(seed, set) of a part's key; None for any other key."""
    match = _PART.search(key)
    return (int(match[1]), match[2]) if match else None


def witnesses(sweep: str, result_digest: str) -> str:
    """The prefix of all witnesses of a digest."""
    return f"{sweep}/witnesses/{result_digest[:32]}/"


def witness(sweep: str, result_digest: str, seed: int) -> str:
    """A seed's witnesses, whatever removals they are of: once there, they are not trained again."""
    return f"{witnesses(sweep, result_digest)}seed-{seed:010d}.parquet"


def read_witness_key(key: str) -> int | None:
    """The seed of a witness's key; None for any other key."""
    match = _WITNESS.search(key)
    return int(match[1]) if match else None


def witness_digest(result_digest: str) -> str:
    """What a witness says that it depends on: never a part's digest, so that it cannot pass for one."""
    return digest([result_digest, "witness"])


def estimates(sweep: str, estimate_digest: str, estimator: str, params: str) -> str:
    """The prefix of one estimator's blocks; ``params`` is canonical JSON."""
    return f"{sweep}/estimates/{estimate_digest[:32]}/{estimator}-{digest(json.loads(params))[:16]}/"


def block(prefix: str, removals: Sequence[NamedRemoval], first: int, count: int, seed: int | None = None) -> str:
    """The block of some removals and evaluation examples ``first`` to ``first + count − 1`` under ``estimates(…)``.

    ``seed``: the one that its values are trained with, of an estimator that trains runs of its own.
    """
    folder = "" if seed is None else f"seed-{seed:010d}/"
    return f"{prefix}{folder}{set_hash(removals)}-{first:08d}-{count:08d}.parquet"


def read_block_key(key: str, prefix: str) -> tuple[int | None, str, int, int] | None:
    """(seed, set, first, count) of a block's key under ``estimates(…)``; None for any other key."""
    match = _BLOCK.fullmatch(key.removeprefix(prefix))
    return (int(match[1]) if match[1] else None, match[2], int(match[3]), int(match[4])) if match else None


def imported(sweep: str, name: str = "") -> str:
    """Another library's scores called ``name``; without a name the prefix of them all."""
    return f"{sweep}/imported/{name}.parquet" if name else f"{sweep}/imported/"


def replicas(sweep: str, result_digest: str, device: str = "", together: int = 1) -> str:
    """The measured stack size on a device type (a name as ``fimo.workers.device.device_name`` gives it).

    ``together``: shards that a stack may hold. Without a device the prefix of all.
    """
    slug = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")[:80]
    own = f"{slug}{f'-{together}' if together > 1 else ''}.json" if device else ""
    return f"{sweep}/replicas/{result_digest[:32]}-{own}"


def proof(sweep: str, result_digest: str, device: str = "", about: str = "") -> str:
    """The verdict on the engine on a device type, for what ``about`` stands for; without a device the prefix of all."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")[:80]
    return f"{sweep}/proofs/{result_digest[:32]}-" + (f"{slug}-{about}.json" if device else "")


def search(sweep: str, search_digest: str, point: str = "", seeds: int | None = None, decision: bool = False) -> str:
    """A point of a search, or a candidate with so many seeds; without a point the prefix of them all.

    ``decision``: whether the candidate goes on from there.
    """
    prefix = f"{sweep}/search/{search_digest[:32]}/"
    rung = "" if seeds is None else f"-{seeds:05d}"
    return f"{prefix}{point[:32]}{rung}{'-decision' if decision else ''}.json" if point else prefix


def failed(sweep: str, task: str = "") -> str:
    """The record of a task that was given up; without a task the prefix of them all."""
    return f"{sweep}/failed/{task}.json" if task else f"{sweep}/failed/"


def job(sweep: str, number: str = "") -> str:
    """The record of a submitted job; without a number the prefix of them all."""
    return f"{sweep}/jobs/{number}.json" if number else f"{sweep}/jobs/"


def driver(sweep: str, number: str = "") -> str:
    """What a running driver says of itself; without a number the prefix of them all."""
    return f"{sweep}/drivers/{number}.json" if number else f"{sweep}/drivers/"


def claim(sweep: str, task: str = "", turn: int = 0) -> str:
    """Which driver computes a task now; ``turn`` counts those that took it over. Without a task the prefix of all."""
    return f"{sweep}/claims/{task}-{turn:04d}.json" if task else f"{sweep}/claims/"


def rejected(sweep: str, key: str = "") -> str:
    """Where a bad object is moved: one flat name, since policies that protect ``*/parts/*`` must not match it."""
    return f"{sweep}/rejected/{key.removeprefix(sweep + '/').replace('/', '_')}"


def table(sweep: str, name: str) -> str:
    """A table by its name in ``fimo.orchestrator.tables.schemas.SCHEMAS``."""
    return f"{sweep}/tables/{name}.parquet"


def made_from(sweep: str) -> str:
    """The digest of what the tables were made from."""
    return f"{sweep}/tables/made-from.json"
