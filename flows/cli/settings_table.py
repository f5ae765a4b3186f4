"""What `calipert settings` shows: each setting with its value, where that comes from, and what it is for."""

from __future__ import annotations

import re

from rich.console import Group, RenderableType
from rich.text import Text

from blocks.config.settings import Settings, list_library_variables, list_sources, read_settings, variable
from core.errors import hide_password
from flows.cli.console import start_table

SECRET = re.compile("PASSWORD|PASSPHRASE|SECRET|TOKEN|KEY|AUTH|HEADERS|CONNECTION_URL")


def build_settings_table() -> RenderableType:
    """Build the table of all settings, and of the variables that libraries read, where any is set.

    Passwords and keys are replaced by dots. Raises UserError for a setting with a wrong value.
    """
    settings = read_settings()
    table = start_table("setting", "value", "from", "what it is for", whole=1, first="bold")
    for field, about in Settings.model_fields.items():
        value = getattr(settings, field)
        origin = "default" if value == about.default else "environment"
        table.add_row(variable(field), _show(variable(field), value), origin, about.description)
    for name, value in list_sources().items():
        table.add_row(name, _show(name, value), "environment", "File of that entry of the catalog, or its folder.")
    others = list_library_variables()
    if not others:
        return table
    libraries = start_table("read by libraries", "value", whole=1, first="bold")
    for name, value in others.items():
        libraries.add_row(name, _show(name, value))
    return Group(table, "", libraries)


def _show(name: str, value: object) -> Text:
    if value is None:
        return Text("not set", style="dim")
    return Text("..." if SECRET.search(name) else hide_password(str(value)))
