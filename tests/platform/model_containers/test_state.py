"""STATE in its image, which is built by choice."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from blocks.config.paths import MODEL_CONTAINERS
from blocks.engines.docker import checkpoints as docker_checkpoints
from blocks.engines.docker.engine import DockerEngine
from blocks.engines.docker.images import find_image
from core.errors import UserError
from flows.cli.model_check import check_model

SMALL = {
    "hidden": 16,
    "layers": 1,
    "heads": 2,
    "feedforward": 16,
    "set_size": 8,
    "batch_size": 4,
    "steps": 6,
    "validate_every": 2,
    "predicted_cells": 3,
}


@pytest.fixture
def folder(docker_client, nothing_left, monkeypatch) -> Path:
    """Skips without the image: it takes gigabytes, under a licence that its user has to accept."""
    monkeypatch.setenv("CALIPERT_GPUS", "none")
    try:
        find_image(docker_client, MODEL_CONTAINERS / "state")
    except UserError as error:
        pytest.skip(str(error))
    return MODEL_CONTAINERS / "state"


def test_it_passes_the_contracts_tests(folder):
    findings = list(check_model(folder, DockerEngine(), "table", SMALL | {"steps": 4}))
    assert [finding for finding in findings if finding.fault] == []
    assert len(findings) == 9


def test_a_training_in_containers_goes_on_to_the_same_bytes(folder, panel, tmp_path, monkeypatch):
    monkeypatch.setattr(docker_checkpoints, "EVERY_S", 0.5)
    monkeypatch.setattr(docker_checkpoints, "SHARE", 1.0)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    said: list[str] = []

    def train(output: str, on_event: Callable[[Mapping[str, Any]], None], **given: str) -> dict[str, str]:
        (tmp_path / output).mkdir(exist_ok=True)
        files = {"cells": panel.folder / "train.h5ad", "embedding": panel.folder / "embedding.parquet"}
        spec: dict[str, Any] = {name: str(path) for name, path in files.items()} | {"output": str(tmp_path / output)}
        spec |= {"hyperparameters": SMALL, "seed": 1, **given}
        DockerEngine().run("train", folder, spec, on_event=on_event, timeout_s=1200)
        return {path.name: sha256(path.read_bytes()).hexdigest() for path in (tmp_path / output).iterdir()}

    def cut_off(event: Mapping[str, Any]) -> None:
        kept = checkpoint / docker_checkpoints.FILE
        if kept.exists():
            with tarfile.open(kept) as archive:
                if any(name.endswith("progress.json") for name in archive.getnames()):
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("broken", cut_off, checkpoint=str(checkpoint))
    again = train("broken", lambda event: said.append(str(event.get("message"))), checkpoint=str(checkpoint))
    assert again == train("whole", lambda event: None)
    assert any("goes on after step" in message for message in said)
