"""compose.yaml as the tests read it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import yaml

from blocks.config.paths import PROJECT_ROOT

COMPOSE = PROJECT_ROOT / "deployments" / "compose.yaml"
# ${NAME:?message} and ${NAME:-default}
VARIABLE = re.compile(r"\$\{(\w+)(?:(:\?|:-)([^}]*))?\}")


@pytest.fixture(scope="session")
def compose() -> Callable[[Mapping[str, str]], dict[str, Any]]:
    """compose.yaml with the values of its variables; ValueError for one that must be set and is not."""

    def read(values: Mapping[str, str]) -> dict[str, Any]:
        def value(found: re.Match[str]) -> str:
            name, kind, text = found.groups()
            if values.get(name):
                return values[name]
            if kind != ":-":
                raise ValueError(f"{name}: {text}")
            return text

        return yaml.safe_load(VARIABLE.sub(value, COMPOSE.read_text(encoding="utf-8")))

    return read


@pytest.fixture(scope="session")
def passwords() -> dict[str, str]:
    """What deployments.secrets writes, by name."""
    from deployments.secrets import EXAMPLE, fill_example

    lines = fill_example(EXAMPLE.read_text(encoding="utf-8")).splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
