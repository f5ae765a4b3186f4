"""The catalog of this installation: the built-in entries and the user's own."""

from __future__ import annotations

from blocks.config.settings import read_settings
from core.catalog.registry import Catalog


def open_catalog() -> Catalog:
    """Return the built-in entries, and those in the folder that CALIPERT_CATALOG names."""
    return Catalog(read_settings().catalog)
