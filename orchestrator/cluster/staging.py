"""What a cluster gets from this machine: the spec, the workload's code and the small files that the spec names.

Invariant: nothing goes up but what is listed here, each file found by name. Never a whole folder, so never `.git`,
data or environments. What the code reads at run time (data beside it, modules named by strings) must be on the
cluster's machines or be fetched by the workload itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fimo.orchestrator.resolve.code import Staged, code_files, write_files
from fimo.orchestrator.spec.spec import Spec, parse
from fimo.workers.errors import UsageError

SPEC_FILE = "spec.yaml"
OUTSIDE = "outside"
"""The folder of the job's working directory for files that lie outside the spec's own."""
MAX_BYTES = 100 * 2**20
"""Ray takes 512 MiB at most, and keeps it in the head's memory."""


def job_files(spec: Spec, beside: Path) -> tuple[Spec, list[Staged], Mapping[str, str]]:
    """Everything that a job needs from here.

    Returns:
        The spec with its file names as they are in the job; the files; the job's name -> the name here of renamed ones.

    Raises:
        UsageError: a file is missing, or all are too large together.
    """
    files = code_files(spec.workload, beside)
    renamed: dict[str, str] = {}
    values = spec.canonical()
    if spec.final_model is not None:
        values["final_model"] = _name_file(spec.final_model, beside, "final_model", files, renamed)
    if spec.removals.file is not None:
        values["removals"]["from"] = _name_file(spec.removals.file, beside, "removals", files, renamed)
    total = sum(file.size for file in files)
    if total > MAX_BYTES:
        largest = max(files, key=lambda file: file.size)
        raise UsageError(
            f"{largest.source} has {largest.size / 2**20:.0f} MiB, too much for a job's working directory "
            f"({MAX_BYTES // 2**20} MiB in all): put it in the store and name it s3://bucket/… in the spec"
        )
    return parse(values), files, renamed


def _name_file(name: str, beside: Path, what: str, files: list[Staged], renamed: dict[str, str]) -> str:
    if "://" in name:
        return name
    path = (beside / Path(name).expanduser()).resolve()
    if not path.is_file():
        raise UsageError(f"{what}: '{name}' is no file beside the spec")
    inside = path.is_relative_to(beside.resolve()) and not Path(name).expanduser().is_absolute()
    target = path.relative_to(beside.resolve()).as_posix() if inside else f"{OUTSIDE}/{what}/{path.name}"
    if target != name:
        renamed[target] = name
    files.append(Staged(path, target, path.stat().st_size))
    return target


def write_job(files: list[Staged], folder: Path, spec: Spec) -> None:
    """Copy files, and the spec as ``spec.yaml``, into an empty folder."""
    write_files(files, folder)
    (folder / SPEC_FILE).write_text(spec_text(spec), encoding="utf-8")


def spec_text(spec: Spec) -> str:
    """A spec as YAML with every default written out."""
    values: dict[str, Any] = spec.canonical()
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
