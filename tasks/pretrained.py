"""What models start from and embeddings are made of, brought to this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.http import TASK_RETRY_DELAYS
from core.catalog.schema import EmbeddingSpec, PretrainedSpec
from tasks.artifacts import LOG, checksum, made
from tasks.inputs import named_source
from tasks.sources import fetch_files, fetch_source, passing


@task(
    name="fetch-weights",
    task_run_name="fetch {spec.name}",
    cache_policy=NO_CACHE,
    retries=4,
    retry_delay_seconds=TASK_RETRY_DELAYS[:4],
    retry_condition_fn=passing,
)
def fetch_pretrained(spec: PretrainedSpec, sources: dict[str, str]) -> Path:
    """The artifact's folder of published files: those of the entry, under its names.

    Raises UserError and ConnectionLost as `fetch_source` does.
    """
    named = named_source(spec, sources)
    if named is None:
        LOG.info("%s: %s; licence: %s; to cite: %s", spec.name, spec.title, spec.licence, spec.citation)
    files = fetch_files(spec) if named is None else {name: named / name for name in sorted(spec.files)}

    def build(folder: Path) -> None:
        for name, file in files.items():
            shutil.copyfile(file, folder / name)

    inputs = {name: checksum(file) for name, file in files.items()}
    return made(
        "pretrained",
        build,
        inputs=inputs,
        parameters={},
        code="a copy",  # no code decides what is in it: embeddings of days and models' weights follow from its key
        label=f"the published files {spec.name}",
    )


def fetch_inputs(needed: Iterable[EmbeddingSpec | PretrainedSpec], sources: dict[str, str]) -> dict[str, Path]:
    """Name -> raw file of an embedding, or artifact's folder of published files (tasks.inputs says what is needed).

    Raises UserError and ConnectionLost as `fetch_source` does.
    """
    return {
        one.name: fetch_pretrained(one, sources) if isinstance(one, PretrainedSpec) else fetch_source(one, sources)
        for one in needed
    }
