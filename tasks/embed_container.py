"""Embeddings that a container makes of published files: a protein language model, a foundation model of cells."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blocks.store.artifacts import artifact_key
from blocks.store.code import code_hash
from core.catalog.schema import EmbeddingSpec
from tasks.artifacts import LOG, key_of, made
from tasks.engine import THREADS, container_of, device, engine, engine_identity, require_same, resumable
from tasks.progress import shown_progress

FILE = "embedding.parquet"
LONGEST_S = 24 * 3600.0  # unless the entry says otherwise


def made_in_container(spec: EmbeddingSpec, published: Path) -> Path:
    """embedding.parquet, checked, of an embedding whose kind is `container`; the artifact's folder.

    published: the artifact of the files that it is made of. Raises UserError where what the container wrote is no
    embedding, and ModelFailed where it ends otherwise than well.
    """
    from core.embeddings.tables import read_foreign_embedding, write_embedding

    container = container_of(spec)
    progress = shown_progress(f"embedding {spec.name}")

    def hear(event: Mapping[str, Any]) -> None:
        progress(event)
        if event.get("event") == "log":
            LOG.info("embedding %s: %s", spec.name, event["message"])

    inputs = {"pretrained": key_of(published)}
    parameters: dict[str, Any] = {"kind": spec.kind, "settings": spec.settings, "threads": THREADS}
    code = engine_identity(container) + code_hash("core.embeddings.tables")

    def build(folder: Path) -> None:
        require_same(container)
        with (
            tempfile.TemporaryDirectory(dir=folder) as scratch,
            device(container, f"embedding {spec.name}") as gpu,
            resumable(artifact_key("embedding", inputs, parameters, code)) as checkpoint,
        ):
            task = {
                "pretrained": str(published),
                "settings": spec.settings,
                "threads": THREADS,
                "output": scratch,
                "checkpoint": checkpoint,
            }
            engine().run("embed", container, task, on_event=hear, timeout_s=spec.time_limit or LONGEST_S, gpu=gpu)
            table = read_foreign_embedding(Path(scratch) / FILE)
        write_embedding(table, folder / FILE)

    label = f"the embedding {spec.name}"
    return made("embedding", build, inputs=inputs, parameters=parameters, code=code, label=label)
