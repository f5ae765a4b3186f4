"""Published files that models start from and embeddings are made of, brought into the store."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from core.catalog.schema import PretrainedSpec, ResolvedModel
from tasks.artifacts import LOG, checksum, made
from tasks.inputs import named_source
from tasks.sources import fetch_files, passing


@task(
    name="fetch-weights",
    task_run_name="fetch {spec.name}",
    cache_policy=NO_CACHE,
    retries=4,
    retry_delay_seconds=[2, 10, 30, 60],
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


def all_pretrained(models: Iterable[ResolvedModel], sources: dict[str, str]) -> dict[str, Path]:
    """Model -> folder of the weights that it starts from; models without any left out. Each is fetched once."""
    specs = {model.name: model.pretrained for model in models if model.pretrained}
    fetched = {
        spec.name: fetch_pretrained(spec, sources) for spec in {one.name: one for one in specs.values()}.values()
    }
    return {name: fetched[spec.name] for name, spec in specs.items()}
