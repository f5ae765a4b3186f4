"""Types of parameters that flows share."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from tasks.inputs import Origin as Origin

Dataset: TypeAlias = str
Models: TypeAlias = list[str]
Folds: TypeAlias = int | Literal["leave-one-out"] | None
Seed: TypeAlias = Annotated[int, Field(ge=0)]
Sources: TypeAlias = dict[str, str]
