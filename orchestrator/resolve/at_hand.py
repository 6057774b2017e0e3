"""A stored sweep's workload: where its code may come from, and which files that the sweep names may be read.

A store does not choose what code runs. The workload is a shipped one, or a module in the folder where the user stands
or that they name, and its code has the recorded digest; no other folder is looked at, whatever the store says. Nor does
a store choose which files are read: they lie in that folder, or are objects of the sweep's own store. More is the
user's word (``Own.trust``).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fimo.orchestrator.resolve import identity
from fimo.orchestrator.resolve.code import local_modules, source_digest
from fimo.orchestrator.spec.shipped import SHIPPED
from fimo.orchestrator.spec.spec import Spec
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.workers.errors import FimoError, UsageError, WorkloadError, plain
from fimo.workers.examples import Examples
from fimo.workers.workload import Workload, find_module, load_workload


@dataclass(frozen=True)
class Own:
    """What the user says of the code and files of a sweep that they know from its store alone.

    Attributes:
        code: the folder of the workload's module, and of the files that the sweep names.
        trust: take an installed workload too, and files and objects wherever the sweep names them.
    """

    code: Path = Path()
    trust: bool = False

    @property
    def folder(self) -> Path:
        """``code`` as an absolute path."""
        return self.code.expanduser().resolve()


HERE = Own()
"""The folder where the user stands, and nothing beside it."""


def own_folder(manifest: Manifest, own: Own, store: str) -> Path:
    """The folder to load the sweep's workload from; nothing is imported.

    Args:
        store: the sweep's own, whose objects it may name.

    Raises:
        UsageError: the code is not there, is not what it was, or the sweep names files that are not the user's word.
    """
    spec, folder = manifest.spec, own.folder
    mend = f"`cd` to the folder of its code, or name it by --code DIR (it was {_shown(manifest.beside)})"
    _, function, path = find_module(spec.workload, folder)
    if spec.workload not in SHIPPED.values() and path is None and not own.trust:
        raise UsageError(
            f"workload {_shown(spec.workload)} is not in {folder}: {mend}; if it is an installed one that you know, "
            "add --trust, or run its spec again"
        )
    if source_digest(spec.workload, folder) != manifest.source:
        where = "this fimo" if path is None else folder
        raise UsageError(
            f"the code of workload {_shown(spec.workload)} in {where} is not as it was when the sweep was started: "
            f"{mend}, or start the spec again with `fimo run`"
        )
    if path is not None and (function.startswith("_") or not _is_of_fimo(spec.workload, folder)):
        raise UsageError(
            f"{_shown(spec.workload)} in {folder} is no workload: a public function of a module that takes "
            "Workload from fimo is one"
        )
    if not own.trust:
        _refuse_strange_files(spec, folder, store)
    return folder


def _is_of_fimo(reference: str, folder: Path) -> bool:
    """Whether a module, or one of the folder's that it imports, imports something of fimo; none of them is run."""
    trees = (ast.parse(path.read_bytes()) for path in local_modules(reference, folder).values())
    nodes = [node for tree in trees for node in ast.walk(tree)]
    named = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    named += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return any(name.partition(".")[0] == "fimo" for name in named)


def _refuse_strange_files(spec: Spec, folder: Path, store: str) -> None:
    """Refuse files outside the folder and objects outside the store, of which the store's record alone speaks."""
    named = [("final_model", spec.final_model), *(("workload_args", text) for text in _texts(spec.workload_args))]
    for key, name in named:
        if name is not None and not is_inside(name, store):
            raise UsageError(
                f"the sweep names {_shown(name)} as its {key}, which is neither in {folder} nor in the sweep's own "
                "store: if you know it, add --trust"
            )
    if spec.workload in SHIPPED.values() and spec.workload_args.get("download"):
        raise UsageError("the sweep asks for a download in its workload_args: if you know it, add --trust")


def is_inside(name: str, store: str) -> bool:
    """Whether a name is of a file inside whatever folder it is looked for in, or of an object of a store."""
    if "://" in name:
        return name.startswith(f"{store.rstrip('/')}/") and ".." not in name.split("/")
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and not name.startswith("~")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _shown(text: str) -> str:
    """Text of a store, in a line of ours."""
    line = " ".join(plain(text).split())
    return line if len(line) <= 120 else f"{line[:119]}…"


def at_hand(manifest: Manifest, own: Own, store: str) -> Workload:
    """The sweep's workload, with the code and the examples that its numbers are of: to show examples as what they are.

    Raises:
        WorkloadError: one line: it is not here, cannot be loaded, or is not what it was.
    """
    spec = manifest.spec
    try:
        workload = load_workload(spec.workload, spec.workload_args, own_folder(manifest, own, store))
        evals = Examples(workload.evals, workload.collate).first(manifest.evals)
        same = identity.examples_digest(Examples(workload.train, workload.collate)) == manifest.train_digest
        if not same or identity.each_digest(evals) != manifest.eval_digests:
            raise WorkloadError(f"the examples of workload {spec.workload} are not what they were")
    except WorkloadError:
        raise
    except FimoError as error:
        raise WorkloadError(str(error)) from error
    except Exception as error:
        raise WorkloadError(f"workload {spec.workload} cannot be loaded here: {type(error).__name__}") from error
    return workload
