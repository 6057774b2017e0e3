"""The sweep spec: validated, frozen, and the one way to configure a sweep.

Reads nothing but what it is given. ``fimo.orchestrator.resolve.identity`` says what a result depends on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from fimo.orchestrator.spec.limits import MOST_SHARDS, check_depth
from fimo.orchestrator.spec.mistakes import in_one_line
from fimo.orchestrator.spec.search import Search
from fimo.orchestrator.spec.section import Count, Index, Section
from fimo.orchestrator.spec.shipped import SHIPPED
from fimo.orchestrator.spec.training import FurtherTraining
from fimo.orchestrator.spec.yaml import MAX_BYTES, read_yaml
from fimo.workers.errors import UsageError, nearest

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class RemovalsSection(Section):
    """Which examples are left out; exactly one of the forms.

    Single examples: ``every`` (with ``count``), ``indices``, ``random`` (with ``seed``), ``all``. Groups: ``groups`` by
    name, ``fraction`` with ``count`` and ``seed`` (random groups of one size), ``by`` (one group for each value of a
    training tensor). Either: ``from`` a file.
    """

    every: Count | None = Field(default=None, description="Training examples 0, every, 2·every … one by one.")
    count: Count | None = Field(
        default=None,
        description="With `every`: this many of them, else to the end. With `fraction`: the number of groups.",
    )
    indices: tuple[Index, ...] | None = Field(
        default=None, description="These training examples, counted from 0, one by one."
    )
    random: Count | None = Field(
        default=None,
        description="This many training examples, drawn with `seed`, one by one. A larger number keeps those of a "
        "smaller one.",
    )
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="`count` groups, each this share of the training examples, drawn with `seed`. Over them the linear "
        "datamodeling score is defined.",
    )
    seed: Index | None = Field(default=None, description="Of `random` and `fraction`; 0 if it is not given.")
    groups: dict[str, tuple[Index, ...]] | None = Field(
        default=None, description="Groups of training examples by name, each left out as a whole: `{name: [indices]}`."
    )
    by: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="A group for each value of this training tensor, one number for each example; `label` is also the "
        "tensor `labels` or `y`.",
    )
    file: str | None = Field(
        default=None,
        alias="from",
        description="A file beside the spec, or a URI: Parquet as pulled (`removals.parquet`), JSON, YAML, or a line "
        "of indices a group.",
    )
    all: bool | None = Field(
        default=None, description="Every training example, one by one; `removals: all` is the same."
    )

    @model_validator(mode="after")
    def _one_form(self) -> RemovalsSection:
        names = ("every", "indices", "random", "fraction", "groups", "by", "file", "all")
        forms = [f for f in names if getattr(self, f) is not None]
        if len(forms) != 1 or self.all is False:
            raise ValueError("give exactly one of every, indices, random, fraction, groups, by, from, or the word all")
        if self.fraction is not None and self.count is None:
            raise ValueError("fraction needs count, the number of random groups")
        if self.count is not None and self.every is None and self.fraction is None:
            raise ValueError("count goes with every or fraction")
        if self.seed is not None and self.random is None and self.fraction is None:
            raise ValueError("seed goes with random or fraction")
        return self

    @property
    def random_groups(self) -> bool:
        """Whether the removals are random groups of one size, over which the linear datamodeling score is defined."""
        return self.fraction is not None


class Seeds(Section):
    """Consecutive seeds ``first … first + count − 1``.

    With ``until_reliability`` a run adds seeds in rounds, from ``min`` to at most ``max``, until the attribution is as
    reliable at every recorded step; ``count`` is then where it stands.
    """

    first: Index = Field(default=0, description="The first seed.")
    count: Count = Field(  # type: ignore[assignment]
        default=None,
        validate_default=False,
        description="How many seeds; `seeds: 10` is the same. With `until_reliability` where a run begins: `min`.",
    )
    until_reliability: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Add seeds in rounds until the attribution agrees with itself this well at every recorded step.",
    )
    min: Annotated[int, Field(ge=2, strict=True)] = Field(
        default=4, description="With `until_reliability`: seeds at least."
    )
    max: Count = Field(default=100, description="With `until_reliability`: seeds at most.")

    @model_validator(mode="before")
    @classmethod
    def _begin(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("until_reliability") is not None and values.get("count") is None:
            return {**values, "count": values.get("min", cls.model_fields["min"].default)}
        return values

    @model_validator(mode="after")
    def _in_range(self) -> Seeds:
        if self.count is None:
            raise ValueError("give count, or until_reliability")
        if self.until_reliability is None and self.model_fields_set & {"min", "max"}:
            raise ValueError("min and max go with until_reliability")
        if self.until_reliability is not None and not self.min <= self.count <= self.max:
            raise ValueError(f"count must lie between min {self.min} and max {self.max}")
        if max(self.first + self.count, self.after or 0) > 2**31:
            raise ValueError("seeds must stay below 2**31")
        if (most := max(self.count, self.max if self.until_reliability is not None else 0)) > MOST_SHARDS:
            raise ValueError(f"{most:,} seeds are more than the {MOST_SHARDS:,} that a sweep can have")
        return self

    @property
    def after(self) -> int | None:
        """The first seed that the sweep never comes to use; None = the one after its last."""
        return None if self.until_reliability is None else self.first + self.max

    def __iter__(self) -> Any:
        return iter(range(self.first, self.first + self.count))


class Resources(Section):
    """What a task is given; never part of a result's identity."""

    gpus: Annotated[float, Field(ge=0, le=1024)] = Field(
        default=0.0,
        description="What Ray reserves for a task; a share (0.01 at least) lets several tasks have one GPU.",
    )
    cpus: Annotated[float, Field(ge=0.01, le=65536)] = Field(
        default=1.0, description="What Ray reserves for a task, and torch's threads."
    )
    accelerator: Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$")] | None = Field(
        default=None,
        description="The one type of GPU that tasks run on, as Ray calls it (`A10G`, `H100`): its node label "
        "`ray.io/accelerator-type`. Tasks wait while no node has it. Without it: any.",
    )
    replicas: Count | Literal["auto"] = Field(
        default="auto",
        description="Cells trained together. `auto`: measured once per device type, and for convolutions on a GPU "
        "whether in one kernel or each cell on a stream.",
    )
    shard: Count | Literal["auto"] = Field(
        default="auto",
        description="Removals in one part, which is what an interruption loses. `auto`: by the cost of a cell. Ten "
        "parts a GPU keep all of them busy; with one each, all wait for the slowest.",
    )
    together: Annotated[int, Field(ge=1, le=4096, strict=True)] | Literal["auto"] = Field(
        default="auto",
        description="Seeds whose shards are trained in the same stacks, each committed as a part of its own. `auto`: "
        "on a GPU so many that a stack has up to 512 cells, fewer of a dear model; 1 without one.",
    )
    deadline_s: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        description="Seconds after which a task is given up and queued again. `auto`: from those before it.",
    )
    estimator_budget_s: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        description="Device-seconds that an estimator of the default set may take in all, by an estimate made before "
        "it runs. `auto`: 60, or a quarter of what the sweep's cells take. What the spec names has no budget.",
    )
    replay: Annotated[bool, Field(strict=True)] = Field(
        default=True,
        description="Trace the steps of small models; on a GPU, record and launch them; multiply large matrices by "
        "oneDNN on CPUs where that is faster. `off`: every step as written, the same numbers to rounding.",
    )
    proof: Annotated[bool, Field(strict=True)] = Field(
        default=True,
        description="Hold a few cells against the plain definition before the first shard. `off`: trust the engine "
        "unproven.",
    )

    @field_validator("gpus")
    @classmethod
    def _gpus_as_ray_has_them(cls, value: float) -> float:
        if 0 < value < 0.01 or (value > 1 and value != int(value)):
            raise ValueError("give 0, a share from 0.01 on, or a whole number of GPUs")
        return value

    witnesses: Index | Literal["auto"] = Field(
        default="auto",
        description="Cells trained again in float64 to measure the noise floor. `auto`: up to 16, for at most a "
        "twentieth of what the sweep costs, at least 1. 0: none, and the floor is a lower bound.",
    )


class Spec(Section):
    """A whole sweep spec."""

    name: Name = Field(description="Of the sweep: its results lie under STORE/name.")
    workload: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$|^[A-Za-z_]\w*$")] = Field(
        description="`module:function`, a function that returns a Workload in a module beside the spec or installed; "
        "or the bare name of a workload that ships with fimo."
    )
    workload_args: dict[str, Any] = Field(default={}, description="Keyword arguments of the workload's function.")
    final_model: str | None = Field(
        default=None,
        description="θᶠ: a `.safetensors` file beside the spec, or a URI. Without it, the parameters that the "
        "workload's model carries.",
    )
    removals: RemovalsSection = Field(
        description="Which training examples are left out, one by one or in groups; `all`, or exactly one form."
    )
    seeds: Seeds = Field(description="Over how many seeds an effect is averaged: a number, or a section.")
    evals: Count | None = Field(
        default=None, description="The first so many evaluation examples. Without it, or `all`: all of them."
    )
    further_training: FurtherTraining = Field(description="How training goes on from θᶠ: what defines the number.")
    estimators: tuple[str | dict[str, Any], ...] | None = Field(
        default=None,
        description="Names, or names with hyper-parameters, of which a list is tried one by one: `{name: cg, damping: "
        "[1.0e-3, 0.1]}`. Without it, all that suit the model and are not too dear; `[]`: none.",
    )
    resources: Resources = Field(default=Resources(), description="What a task is given; may differ from run to run.")
    search: Search | None = Field(default=None, description="What `fimo search` tries; every other command ignores it.")

    @field_validator("workload")
    @classmethod
    def _shipped_by_name(cls, value: str) -> str:
        """A bare name is a shipped workload and stands for its long form, so that both have one digest."""
        if ":" in value:
            return value
        if value not in SHIPPED:
            raise ValueError(f"no shipped workload is called so{nearest(value, SHIPPED)}; your own is module:function")
        return SHIPPED[value]

    @field_validator("removals", mode="before")
    @classmethod
    def _all_removals(cls, value: Any) -> Any:
        return {"all": True} if value == "all" else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted_seeds(cls, value: Any) -> Any:
        return {"count": value} if isinstance(value, int) else value

    @field_validator("evals", mode="before")
    @classmethod
    def _all_evals(cls, value: Any) -> Any:
        return None if value == "all" else value

    def canonical(self) -> dict[str, Any]:
        """The spec as plain JSON values with every default written out; ``parse`` of it gives the spec back.

        ``search`` is left out: it is part of no number, and a sweep is what it is whatever is searched on it.
        """
        plain = self.model_dump(mode="json", by_alias=True, exclude={"search"})
        plain["removals"] = {k: v for k, v in plain["removals"].items() if v is not None}
        if self.seeds.until_reliability is None:
            plain["seeds"] = {"first": self.seeds.first, "count": self.seeds.count}
        plain["further_training"]["evaluate"] = {
            k: v for k, v in plain["further_training"]["evaluate"].items() if v is not None
        }
        return plain


def parse(values: Any, name: str = "the spec") -> Spec:
    """Validate plain values.

    Raises:
        UsageError: one line: where, what is wrong, and the nearest known key.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{name} must be a mapping of keys (name, workload, removals, …)")
    check_depth(values, name)
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{name}: {in_one_line(error, Spec)}") from error


def read(text: str, name: str = "the spec") -> Spec:
    """Parse and validate a spec's YAML text; raises UsageError."""
    return parse(read_yaml(text, name), name)


def read_file(path: Path) -> Spec:
    """Read, parse and validate a spec file.

    Raises:
        UsageError: one line: it cannot be read, or see ``parse``.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"spec {path} cannot be read: {reason}") from error
    return read(text, str(path))
