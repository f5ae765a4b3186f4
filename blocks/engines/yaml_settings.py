"""The YAML file of an engine's settings, checked against their schema."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from core.errors import UserError

_S = TypeVar("_S", bound=BaseModel)


def read_yaml_settings(
    schema: type[_S], path: Path, variable: str, page: str, *, empty: object = None, secret: tuple[str, ...] = ()
) -> _S:
    """Return the settings in a YAML file.

    variable: of the environment, that names the file. page: that explains them. empty: what an empty file means.
    secret: fields whose values no message repeats. Raises UserError for a file that cannot be read or does not fit.
    """
    remedy = f"correct it as {page} says"
    try:
        return schema.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or empty)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(path, f"file ({variable})", str(error), remedy) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        # No value of many fields is repeated, nor the cause that does: a password may be among them.
        hidden = field in secret or not isinstance(first["input"], str | int | float)
        found = first["msg"] if hidden else f"{first['input']!r}: {first['msg']}"
        raise UserError(path, field, found, remedy) from None
