"""Real images of models: built, and asked what the contract asks, within the walls of a container."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from blocks.engines.docker import checkpoints as docker_checkpoints
from blocks.engines.docker.engine import DockerEngine
from blocks.engines.docker.images import build_image, find_image
from blocks.engines.process import ProcessEngine
from core.catalog.schema import Form
from core.errors import UserError
from flows.cli.model_check import check_model
from model_containers import contract

pytestmark = pytest.mark.usefixtures("nothing_left")

MODELS = Path(contract.__file__).parent
SMALL = {
    "fmlp": {"epochs": 4, "validate_every": 2, "hidden": 32, "latent": 8, "batch_size": 64},
    "gears": {"epochs": 2, "hidden": 8},
    "knn": {},
    "presage": {"epochs": 4, "item_hidden": 16, "source_hidden": 8, "batch_size": 8},
    "ridge": {},
    "scgpt": {"width": 16, "heads": 2, "layers": 1, "hidden": 16, "epochs": 2, "sequence": 20, "pool": 8},
    "sclambda": {"epochs": 4, "validate_every": 2, "hidden": 32, "latent": 8, "batch_size": 64},
}


@pytest.fixture(scope="module")
def torch_index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A package index with PyTorch for CPUs: TORCH_INDEX, or one of what pip's `find-links` has on this machine.

    Skips without either: the ordinary index's brings gigabytes of CUDA along.
    """
    if os.environ.get("TORCH_INDEX"):
        yield os.environ["TORCH_INDEX"]
        return
    folder = tmp_path_factory.mktemp("index")
    lines = (MODELS / "fmlp" / "requirements.txt").read_text().splitlines()
    (wanted,) = (line for line in lines if line.startswith("torch=="))
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run([*download, "--dest", folder / "torch", wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no {wanted} for CPUs on this machine, and no TORCH_INDEX: {done.stderr}")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def built(docker_client, base_image, request, monkeypatch) -> Callable[[str], Path]:
    """The folder of a model whose image is there; one that was built from other files is built anew."""
    monkeypatch.setenv("CALIPERT_GPUS", "none")

    def build(name: str) -> Path:
        folder = MODELS / name
        arguments = {"BASE_IMAGE": base_image}
        if "torch==" in (folder / "requirements.txt").read_text():
            arguments["TORCH_INDEX"] = request.getfixturevalue("torch_index")
        try:
            find_image(docker_client, folder)
        except UserError:
            build_image(docker_client, folder, arguments, print)
        return folder

    return build


# All take half an hour and 10 GB: only where somebody asks for it.
NAMES = sorted(SMALL) if os.environ.get("CALIPERT_ALL_IMAGES") == "1" else ["fmlp", "ridge"]


@pytest.mark.parametrize("name", NAMES)
def test_it_passes_the_contracts_tests(built, name):
    form: Form = "graph" if name == "gears" else "table"
    findings = list(check_model(built(name), DockerEngine(), form, SMALL[name]))
    assert [finding for finding in findings if finding.fault] == []
    assert len(findings) == 9


def test_an_embedding_is_the_same_as_that_of_a_process(built, tmp_path):
    published, names = tmp_path / "published", ("token_dictionary_gc104M.pkl", "gene_name_id_dict_gc104M.pkl")
    published.mkdir()
    for name, content in zip(names, ({"ENSG1": 1, "ENSG2": 0}, {"AAA": "ENSG1", "BBB": "ENSG2"}), strict=True):
        (published / name).write_bytes(pickle.dumps(content))
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_file({"bert.embeddings.word_embeddings.weight": rows}, published / "model.safetensors")
    (published / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    made = []
    for engine in (DockerEngine(), ProcessEngine()):
        output = tmp_path / type(engine).__name__
        output.mkdir()
        spec = {"pretrained": str(published), "settings": {}, "threads": 1, "output": str(output)}
        engine.run("embed", built("geneformer"), spec, on_event=lambda event: None, timeout_s=300)
        made.append((output / "embedding.parquet").read_bytes())
    assert made[0] == made[1]
    table = contract.read_embedding(tmp_path / "DockerEngine" / "embedding.parquet")
    assert table.to_numpy().tolist() == [[3.0, 4.0, 5.0], [0.0, 1.0, 2.0]]


def test_a_training_that_was_cut_off_goes_on_to_the_same_bytes(built, panel, tmp_path, monkeypatch):
    monkeypatch.setattr(docker_checkpoints, "EVERY_S", 0.5)
    monkeypatch.setattr(docker_checkpoints, "SHARE", 1.0)
    folder, checkpoint = built("fmlp"), tmp_path / "checkpoint"
    checkpoint.mkdir()
    said: list[str] = []

    def train(output: str, on_event: Callable[[Mapping[str, Any]], None], **given: str) -> dict[str, str]:
        (tmp_path / output).mkdir(exist_ok=True)
        spec = {
            "cells": str(panel.folder / "train.h5ad"),
            "embedding": str(panel.folder / "embedding.parquet"),
            "hyperparameters": SMALL["fmlp"] | {"epochs": 400},
            "seed": 1,
            "output": str(tmp_path / output),
        }
        DockerEngine().run("train", folder, spec | given, on_event=on_event, timeout_s=300)
        return {path.name: sha256(path.read_bytes()).hexdigest() for path in (tmp_path / output).iterdir()}

    def cut_off(event: Mapping[str, Any]) -> None:
        kept = checkpoint / docker_checkpoints.FILE
        if kept.exists():
            with tarfile.open(kept) as archive:
                if archive.getnames():
                    raise KeyboardInterrupt

    def hear(event: Mapping[str, Any]) -> None:
        said.append(str(event.get("message", "")))

    with pytest.raises(KeyboardInterrupt):
        train("broken", cut_off, checkpoint=str(checkpoint))
    assert train("broken", hear, checkpoint=str(checkpoint)) == train("whole", lambda event: None)
    assert any("goes on after epoch" in message for message in said)
