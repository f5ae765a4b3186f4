"""Tasks that make gene embeddings: one for all data sets, or one per fold from its training cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.config.catalog import open_catalog
from blocks.store.code import code_hash
from core.catalog.schema import EmbeddingSpec, ResolvedModel
from core.embeddings.files import EMBEDDING
from tasks.artifacts import Recipe, build_or_get, checksum_file
from tasks.embed_container import embed_in_container
from tasks.embed_texts import embed_texts


@task(name="embed", task_run_name="embed {spec.name}", cache_policy=NO_CACHE)
def embed(spec: EmbeddingSpec, source: Path, perturbed: list[str]) -> Path:
    """Make an embedding that is one table of genes x dimensions, or a graph; the artifact's folder.

    source: the raw file or the published files (artifact) of a shared embedding, or the fold (artifact) of a per-fold
    one. perturbed: the genes that a graph is between; among all genes, hardly any of a gene's nearest ones would be
    perturbed in the same screen.
    """
    from core.embeddings.tables import write_embedding

    if spec.container:
        return embed_in_container(spec, source)
    if spec.service:
        return embed_texts(spec, source)
    if spec.dimensions is None:
        raise ValueError(f"{spec.name} is put together from its parts")
    compute, dimensions = COMPUTE[spec.kind], spec.dimensions
    genes = {"genes": sorted(perturbed)} if spec.form == "graph" else {}
    recipe = Recipe(
        "embedding",
        {"source": source if source.is_dir() else checksum_file(source)},
        {"kind": spec.kind, "dimensions": dimensions, **genes},
        code_hash("core.embeddings.gene_graph" if spec.form == "graph" else "core.embeddings.tables"),
        label=f"the embedding {spec.name}",
    )
    return build_or_get(
        recipe, lambda folder: write_embedding(compute(source, dimensions, **genes), folder / EMBEDDING)
    )


@task(name="join-embeddings", task_run_name="embed {spec.name}", cache_policy=NO_CACHE)
def join_embeddings(spec: EmbeddingSpec, parts: dict[str, Path]) -> Path:
    """Put several tables side by side; the artifact's folder of embedding.parquet. parts: their artifacts, by name."""
    from core.embeddings.tables import join_tables, read_embedding, write_embedding

    def build(folder: Path) -> None:
        tables = {name: read_embedding(part / EMBEDDING) for name, part in parts.items()}
        write_embedding(join_tables(tables), folder / EMBEDDING)

    parameters = {"kind": spec.kind, "parts": list(parts)}
    code = code_hash("core.embeddings.tables")
    return build_or_get(Recipe("embedding", parts, parameters, code, f"the embedding {spec.name}"), build)


def make_shared_embedding(spec: EmbeddingSpec, inputs: Mapping[str, Path]) -> Path:
    """Make an embedding that is the same for all data sets; the artifact's folder. inputs: of `fetch_inputs`."""
    return _make_whole(spec, lambda part: embed(part, inputs[part.pretrained or part.name], []))


def _make_whole(spec: EmbeddingSpec, make_part: Callable[[EmbeddingSpec], Path]) -> Path:
    if spec.form != "tables":
        return make_part(spec)
    return join_embeddings(spec, {part.name: make_part(part) for part in open_catalog().parts(spec)})


def make_embeddings(
    models: Iterable[ResolvedModel], data: Mapping[int, Path], inputs: Mapping[str, Path], perturbed: list[str]
) -> dict[tuple[str, int], Path | None]:
    """Make the embeddings of models, each once; (model, fold) -> its artifact's folder, None for a model without one.

    data: the folds' artifacts. inputs: of `fetch_inputs`. perturbed: the genes that models will need. Raises
    UserError if a model's embedding has none of them.
    """
    from core.embeddings.tables import list_known_genes, require_coverage

    by_key: dict[tuple[str, int | None], Path] = {}

    def make_once(spec: EmbeddingSpec, fold: int) -> Path:
        key = (spec.name, fold if spec.per_fold else None)
        if key not in by_key:
            if spec.form == "tables":
                by_key[key] = _make_whole(spec, lambda part: make_once(part, fold))
            else:
                source = data[fold] if spec.per_fold else inputs[spec.pretrained or spec.name]
                by_key[key] = embed(spec, source, perturbed)
        return by_key[key]

    made: dict[tuple[str, int], Path | None] = {}
    for model in models:
        for fold in data:
            folder = made[model.name, fold] = make_once(model.embedding, fold) if model.embedding else None
            if folder and model.embedding:
                require_coverage(model.embedding.name, list_known_genes(folder / EMBEDDING), perturbed)
    return made


def _pathways(gmt: Path, dimensions: int) -> pd.DataFrame:
    from core.embeddings.tables import embed_pathways

    return embed_pathways(gmt, dimensions)


def _coexpression(fold: Path, dimensions: int) -> pd.DataFrame:
    from core.embeddings.tables import embed_fold

    return embed_fold(fold, dimensions)


def _graph(annotations: Path, neighbours: int, genes: list[str]) -> pd.DataFrame:
    from core.embeddings.gene_graph import build_gene_graph, read_gene_terms

    return build_gene_graph(read_gene_terms(annotations), neighbours, genes)


COMPUTE: dict[str, Callable[..., pd.DataFrame]] = {"gmt": _pathways, "coexpression": _coexpression, "graph": _graph}
