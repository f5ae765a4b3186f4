"""Limits of containers, from a file."""

from __future__ import annotations

import pytest

from blocks.engines.docker.engine import DockerEngine
from blocks.engines.docker.limits import Limits
from core.errors import UserError


@pytest.mark.parametrize(
    ("text", "field"),
    [("memory: 1GiB\ncolour: red", "colour"), ("memory: -1", "memory"), ("[", "file"), ("pids: many", "pids")],
)
def test_wrong_limits_are_named(tmp_path, monkeypatch, text, field):
    file = tmp_path / "limits.yaml"
    file.write_text(text)
    monkeypatch.setenv("CALIPERT_DOCKER", str(file))
    with pytest.raises(UserError, match=rf"(?s)limits\.yaml.*{field}.*docs/containers\.md"):
        DockerEngine()


def test_limits_of_a_file(tmp_path, monkeypatch):
    file = tmp_path / "limits.yaml"
    file.write_text("memory: 24GiB\ncpus: 1.5\n")
    monkeypatch.setenv("CALIPERT_DOCKER", str(file))
    limits = DockerEngine().limits
    assert limits.memory == 24 * 2**30
    assert limits.cpus == 1.5
    assert limits.pids == Limits().pids
