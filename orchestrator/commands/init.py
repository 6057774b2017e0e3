"""``fimo init``: a spec and a module that run as they are, to be made one's own."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Annotated

import typer

from fimo.orchestrator.commands.app import JsonOption, app, print_json, print_lines, tell
from fimo.orchestrator.starters import KINDS

SCHEMA = "fimo.schema.json"


@app.command()
def init(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help=", ".join(KINDS) + ".", autocompletion=lambda: list(KINDS))
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where the files go.")] = Path("."),
    name: Annotated[str | None, typer.Option("--name", help="Of the files and the sweep; default: the kind's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a commented spec and its workload's module, which run as they are: the place to begin."""
    from fimo.workers.errors import StoreError, UsageError, nearest

    if kind not in KINDS:
        raise UsageError(f"there is no kind '{kind}' of workload{nearest(kind, KINDS)}")
    stem = KINDS[kind]
    name = check_name(name or stem)
    files = {to / f"{name}.{ending}": renamed(text_of(f"{stem}.{ending}"), stem, name) for ending in ("yaml", "py")}
    if there := [str(path) for path in files if path.exists()]:
        raise UsageError(f"'{there[0]}' exists and is not overwritten: give another --name, or --to another folder")
    try:
        to.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        # fimo's own, and the same in every folder: of another version, it is brought up to date.
        (to / SCHEMA).write_text(text_of(SCHEMA), encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write to {to}: {error.strerror or error}") from error
    spec, module = map(str, files)
    if as_json:
        print_json({"kind": kind, "name": name, "spec": spec, "module": module, "schema": str(to / SCHEMA)})
        return
    print_lines([spec, module, str(to / SCHEMA)])
    tell(f"next: fimo plan {spec}")
    tell(f"next: fimo run {spec} --store runs")
    tell(f"then put your own model and data into {module}")


def check_name(name: str) -> str:
    """A name that a module can have and no other module has; raises UsageError."""
    from fimo.workers.errors import UsageError

    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,99}", name):
        raise UsageError(f"--name '{name}' is no module's: use letters, digits and '_', starting with a letter")
    spec = importlib.util.find_spec(name)
    if spec is not None and Path(spec.origin or "").resolve().parent != Path.cwd():
        raise UsageError(f"--name '{name}' is an installed module's, which the file would hide: choose another")
    return name


def text_of(file: str) -> str:
    """A file of ``fimo.orchestrator.starters``."""
    from importlib.resources import files

    return files("fimo.orchestrator.starters").joinpath(file).read_text(encoding="utf-8")


def renamed(text: str, stem: str, name: str) -> str:
    """The text with its file's stem, wherever it names a file, a module or the sweep, replaced."""
    text = re.sub(rf"\b{stem}(?=\.(?:py|yaml|safetensors)\b|:workload)", name, text)
    return re.sub(rf"(?<=^name: ){stem}\b|(?<=STORE/){stem}\b", name, text, flags=re.MULTILINE)
