"""Tasks that make gene embeddings: one for all data sets, or one per fold from its training cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.code import code_hash
from core.catalog.schema import EmbeddingSpec, ResolvedModel
from tasks.artifacts import checksum, made
from tasks.sources import fetch_source

FILE = "embedding.parquet"


@task(name="embed", task_run_name="embed {spec.name}", cache_policy=NO_CACHE)
def embed(spec: EmbeddingSpec, source: Path, perturbed: list[str]) -> Path:
    """embedding.parquet of genes x dimensions; the artifact's folder.

    source: the raw file of a shared embedding, or the fold (artifact) of a per-fold one. perturbed: the genes that
    models will need, none where that is not known. Raises UserError where it covers none of them.
    """
    from core.embedding import read_embedding, require_coverage, write_embedding

    compute = COMPUTE[spec.kind]
    folder = made(
        "embedding",
        lambda folder: write_embedding(compute(source, spec.dimensions), folder / FILE),
        inputs={"source": source if source.is_dir() else checksum(source)},
        parameters={"kind": spec.kind, "dimensions": spec.dimensions},
        code=code_hash("core.embedding"),
        label=f"the embedding {spec.name}",
    )
    if perturbed:
        require_coverage(spec.name, read_embedding(folder / FILE), perturbed)
    return folder


def make_embeddings(
    models: Iterable[ResolvedModel], data: Mapping[int, Path], sources: dict[str, str], perturbed: list[str]
) -> dict[tuple[str, int], Path | None]:
    """(model, fold) -> folder of its embedding.parquet, None for a model without one. Each is made once.

    data: the folds' artifacts. sources: files that the user named. perturbed: the genes that models will need.
    """
    by_key: dict[tuple[str, int | None], Path] = {}
    given: dict[tuple[str, int], Path | None] = {}
    for model in models:
        for fold, part in data.items():
            spec = model.embedding
            if spec is None:
                given[model.name, fold] = None
                continue
            key = (spec.name, fold if spec.per_fold else None)
            if key not in by_key:
                by_key[key] = embed(spec, part if spec.per_fold else fetch_source(spec, sources), perturbed)
            given[model.name, fold] = by_key[key]
    return given


def _pathways(gmt: Path, dimensions: int) -> pd.DataFrame:
    from core.embedding import pathway_embedding

    return pathway_embedding(gmt, dimensions)


def _coexpression(fold: Path, dimensions: int) -> pd.DataFrame:
    from core.embedding import fold_coexpression

    return fold_coexpression(fold, dimensions)


COMPUTE: dict[str, Callable[[Path, int], pd.DataFrame]] = {"gmt": _pathways, "coexpression": _coexpression}
