"""Checksums of files are read once, and again when the file has changed."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest

from blocks.store.checksums import file_checksum


def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    """That it is read only once otherwise, tests/blocks/store/test_artifacts.py shows."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert file_checksum(path) == sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert file_checksum(path) == sha256(b"two").hexdigest()
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        file_checksum(path)


def test_a_file_is_known_at_the_place_that_it_goes_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "before").write_bytes(b"one")
    file_checksum(tmp_path / "before", tmp_path / "after")
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.setattr(Path, "open", None)
    assert file_checksum(tmp_path / "after") == sha256(b"one").hexdigest()
