"""Folders that outlive a training which is killed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from blocks.engines import checkpoints
from blocks.engines.checkpoints import checkpoint


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path))
    return tmp_path


def cut_off(key: str, text: str) -> None:
    """A training that dies after it wrote something."""
    try:
        with checkpoint(key) as folder:
            (folder / "state").write_text(text)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return


def test_what_an_error_leaves_is_there_again(data: Path) -> None:
    cut_off("a", "half")
    with checkpoint("b") as other:
        assert list(other.iterdir()) == []
    with checkpoint("a") as folder:
        assert (folder / "state").read_text() == "half"
    assert list((data / "checkpoints").iterdir()) == []


def test_what_nobody_comes_back_to_is_given_up(data: Path) -> None:
    old = time.time() - checkpoints.KEPT_S - 60
    for name in ("old", "touched", "mine"):
        folder = data / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "state").write_text("half")
        for path in (folder / "state", folder):
            os.utime(path, (old, old))
    os.utime(data / "checkpoints" / "touched" / "state")
    cut_off("new", "half")
    assert sorted(path.name for path in (data / "checkpoints").iterdir()) == ["new", "touched"]


def test_a_folder_that_goes_while_others_look_disturbs_nobody(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off("a", "half")
    seen = Path.rglob

    def vanishing(self: Path, pattern: str) -> list[Path]:
        return [*seen(self, pattern), self / "renamed meanwhile"]

    monkeypatch.setattr(Path, "rglob", vanishing)
    old = time.time() - checkpoints.KEPT_S - 60
    for path in (data / "checkpoints" / "a" / "state", data / "checkpoints" / "a"):
        os.utime(path, (old, old))
    with checkpoint("b") as folder:
        assert folder.is_dir()
    assert (data / "checkpoints" / "a").is_dir()
