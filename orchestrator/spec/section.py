"""What every section of a spec is made of: frozen, no unknown keys, no infinities."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of a spec's sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


Index = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
