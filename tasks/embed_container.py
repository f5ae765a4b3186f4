"""Embeddings made by a container: from the weights of a protein model, a foundation model of cells."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blocks.store.code import code_hash
from core.catalog.schema import EmbeddingSpec
from core.embeddings.files import EMBEDDING
from tasks.artifacts import LOG, Recipe, build_or_get
from tasks.engine import (
    THREADS,
    choose_engine,
    find_container_of,
    identify_container,
    lease_device,
    open_checkpoint,
    require_unchanged,
)
from tasks.progress import make_progress_reporter

LONGEST_S = 24 * 3600.0  # unless the entry says otherwise


def embed_in_container(spec: EmbeddingSpec, published: Path) -> Path:
    """Make an embedding whose kind is `container`, and check it; the artifact's folder of embedding.parquet.

    published: the artifact of the files that it is made of. Raises UserError if what the container wrote is no
    embedding, and ModelFailed if the container fails.
    """
    from core.embeddings.tables import read_foreign_embedding, write_embedding

    container = find_container_of(spec)
    report_progress = make_progress_reporter(f"embedding {spec.name}")

    def take_event(event: Mapping[str, Any]) -> None:
        report_progress(event)
        if event.get("event") == "log":
            LOG.info("embedding %s: %s", spec.name, event["message"])

    recipe = Recipe(
        "embedding",
        {"pretrained": published},
        {"kind": spec.kind, "settings": spec.settings, "threads": THREADS},
        identify_container(container) + code_hash("core.embeddings.tables"),
        label=f"the embedding {spec.name}",
    )

    def build(folder: Path) -> None:
        require_unchanged(container)
        with (
            tempfile.TemporaryDirectory(dir=folder) as scratch,
            lease_device(container, f"embedding {spec.name}") as gpu,
            open_checkpoint(recipe.key) as checkpoint,
        ):
            task = {
                "pretrained": str(published),
                "settings": spec.settings,
                "threads": THREADS,
                "output": scratch,
                "checkpoint": checkpoint,
            }
            limit = spec.time_limit or LONGEST_S
            choose_engine().run("embed", container, task, on_event=take_event, timeout_s=limit, gpu=gpu)
            table = read_foreign_embedding(Path(scratch) / EMBEDDING)
        write_embedding(table, folder / EMBEDDING)

    return build_or_get(recipe, build)
