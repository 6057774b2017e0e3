"""Reading YAML and JSON that somebody else wrote: data alone, bounded, in one line of error.

Not here: what the data means (``fimo.orchestrator.spec.spec``).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from fimo.workers.errors import UsageError

MAX_BYTES = 4 * 2**20
"""What is parsed in some twenty seconds; long lists of removals are read from files of their own."""


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases (no recursion, no expansion bombs), without repeated keys, with 1e-3 a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            # A key that is a list or a mapping is refused below.
            if (text := str(key.value)) in seen:
                raise yaml.YAMLError(f"the key '{text[:60]}' is given twice")
            seen.add(text)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str, name: str) -> Any:
    """Parse YAML (or JSON, its subset).

    Args:
        name: how to call the text in an error.

    Raises:
        UsageError: not YAML, too large, aliases, repeated keys, or nested beyond reason.
    """
    if len(text) > MAX_BYTES:
        raise UsageError(
            f"{name} is larger than {MAX_BYTES // 2**20} MiB: long lists of removals go into a file of lines, JSON or "
            "Parquet, which the spec names"
        )
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise UsageError(f"{name} is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        said = getattr(error, "problem", None) or str(error)
        raise UsageError(f"{name} is not valid YAML{where}: {' '.join(str(said).split())}") from error
