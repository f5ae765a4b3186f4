"""The content of a small artifact, and of none."""

from __future__ import annotations

from pathlib import Path


def write(folder: Path) -> None:
    (folder / "table.txt").write_text("0123456789", encoding="utf-8")
    (folder / "weights").mkdir()
    (folder / "weights" / "layer.bin").write_bytes(b"\0" * 1000)


def refuse(folder: Path) -> None:
    raise AssertionError(f"{folder} was built again")
