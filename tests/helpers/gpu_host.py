"""A host whose GPUs are names, with locks and data of a test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from blocks.local import cancellation, gpus


def make_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a host without GPU; call the result to name some."""
    monkeypatch.setenv("CALIPERT_DATA", str(folder / "data"))
    monkeypatch.setenv(gpus.LOCKS, str(folder / "locks"))
    monkeypatch.setenv(gpus.GPUS, "none")
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setattr(cancellation, "_STOPS", [])
    return lambda names: monkeypatch.setenv(gpus.GPUS, names)


def list_free() -> list[str]:
    """List the GPUs that are free."""
    return [gpu for gpu, holder in gpus.list_holders() if holder is None]
