"""What models start from and embeddings are made of, brought to this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.http import TASK_RETRY_DELAYS
from core.catalog.schema import EmbeddingSpec, PretrainedSpec
from tasks.artifacts import LOG, Recipe, build_or_get, checksum_file
from tasks.sources import fetch_files, fetch_source, is_worth_a_retry


@task(
    name="fetch-weights",
    task_run_name="fetch {spec.name}",
    cache_policy=NO_CACHE,
    retries=4,
    retry_delay_seconds=TASK_RETRY_DELAYS[:4],
    retry_condition_fn=is_worth_a_retry,
)
def fetch_pretrained(spec: PretrainedSpec, folder: Path | None = None) -> Path:
    """Return the artifact's folder of published files, under the names of the entry.

    folder: the user's own, if there is one. Raises UserError and ConnectionLost as `fetch_source` does.
    """
    if folder is None:
        LOG.info("%s: %s; licence: %s; to cite: %s", spec.name, spec.title, spec.licence, spec.citation)
    files = fetch_files(spec) if folder is None else {name: folder / name for name in sorted(spec.files)}

    def build(target: Path) -> None:
        for name, file in files.items():
            shutil.copyfile(file, target / name)

    # No code decides what is in it: embeddings of days and models' weights follow from its key.
    checksums = {name: checksum_file(file) for name, file in files.items()}
    return build_or_get(Recipe("pretrained", checksums, {}, "a copy", f"the published files {spec.name}"), build)


def fetch_inputs(needed: Iterable[EmbeddingSpec | PretrainedSpec], files: Mapping[str, Path]) -> dict[str, Path]:
    """Return name -> raw file of an embedding, or artifact's folder of published files (tasks.inputs.list_inputs).

    files: what the user has. Raises UserError and ConnectionLost as `fetch_source` does.
    """
    return {
        one.name: fetch_pretrained(one, files.get(one.name))
        if isinstance(one, PretrainedSpec)
        else fetch_source(one, files.get(one.name))
        for one in needed
    }
