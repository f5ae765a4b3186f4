"""The form of a deployment: the schema of its parameters, which Prefect shows and by which its server checks them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any, get_type_hints

from prefect import Flow
from prefect.utilities.callables import parameter_schema
from pydantic.fields import FieldInfo

from deployments.table import Deployment

FIELDS = 12  # up to so many keys of a mapping have a field each in the form; more are written as JSON


def build_form(flow: Flow[..., Any], row: Deployment) -> dict[str, Any]:
    """Build the schema of a flow's parameters with titles, descriptions, and the row's defaults and choices.

    Raises ValueError where the row has a default, hint or choices for a parameter that the flow does not take.
    """
    schema: dict[str, Any] = json.loads(_schema(flow))
    properties = schema["properties"]
    unknown = {*row.parameters, *row.choices, *row.hints} - properties.keys()
    if unknown:
        raise ValueError(f"{row.full_name}: the flow does not take {', '.join(sorted(unknown))}")
    for name, value in row.parameters.items():
        properties[name]["default"] = value
    for name, values in row.choices.items():
        _offer(properties[name], values)
    for name, hint in row.hints.items():
        properties[name]["description"] += f" {hint}"
    return schema


def _offer(schema: dict[str, Any], values: Sequence[str]) -> None:
    """Restrict a text, the items of a list, or the keys of a mapping to some values."""
    # Of all data sets, not of this one.
    schema.pop("examples", None)
    if schema["type"] == "array":
        schema["items"]["enum"] = list(values)
    elif schema["type"] != "object":
        schema["enum"] = list(values)
    elif len(values) <= FIELDS:
        field = schema.pop("additionalProperties")
        schema["properties"] = {value: {**field, "title": value} for value in values}
        schema["additionalProperties"] = False
    else:
        schema["propertyNames"] = {"enum": list(values)}


@cache
def _schema(flow: Flow[..., Any]) -> str:
    """Build the schema as JSON, so that no caller changes what is cached."""
    schema = parameter_schema(flow).model_dump_for_openapi()
    for name, hint in get_type_hints(flow.fn, include_extras=True).items():
        # Prefect names a parameter after its variable and leaves descriptions out.
        for info in (one for one in getattr(hint, "__metadata__", ()) if isinstance(one, FieldInfo)):
            shown = {"title": info.title, "description": info.description}
            schema["properties"][name] |= {key: text for key, text in shown.items() if text is not None}
    return json.dumps(schema)
