"""Tasks that make gene embeddings: one for all data sets, or one per fold from its training cells."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.config.catalog import open_catalog
from blocks.store.code import code_hash
from core.catalog.schema import EmbeddingSpec, ResolvedModel
from core.embeddings.files import EMBEDDING
from tasks.artifacts import Recipe, build_or_get, checksum_file
from tasks.embed_texts import embed_texts
from tasks.engine import THREADS, find_container_of, identify_container, run_stage
from tasks.progress import log_message, make_progress_reporter

LONGEST_S = 24 * 3600.0  # for a container, unless the entry says otherwise


@task(name="embed", task_run_name="embed {spec.name}", cache_policy=NO_CACHE)
def embed(spec: EmbeddingSpec, source: Path, perturbed: list[str]) -> Path:
    """Make an embedding that is one table of genes x dimensions, or a graph; the artifact's folder.

    source: the raw file or the published files (artifact) of a shared embedding, or the fold (artifact) of a per-fold
    one. perturbed: the genes that a graph is between; among all genes, hardly any of a gene's nearest ones would be
    perturbed in the same screen.
    """
    from core.embeddings.gene_graph import build_gene_graph, read_gene_terms
    from core.embeddings.tables import embed_fold, embed_pathways, write_embedding

    if spec.container:
        return _embed_in_container(spec, source)
    if spec.service:
        return embed_texts(spec, source)
    if spec.dimensions is None:
        raise ValueError(f"{spec.name} is put together from its parts")
    dimensions, is_graph, genes = spec.dimensions, spec.form == "graph", sorted(perturbed)

    def build(folder: Path) -> None:
        if is_graph:
            table = build_gene_graph(read_gene_terms(source), dimensions, genes)
        else:
            table = (embed_fold if spec.per_fold else embed_pathways)(source, dimensions)
        write_embedding(table, folder / EMBEDDING)

    recipe = Recipe(
        "embedding",
        {"source": source if source.is_dir() else checksum_file(source)},
        {"kind": spec.kind, "dimensions": dimensions, **({"genes": genes} if is_graph else {})},
        code_hash("core.embeddings.gene_graph" if is_graph else "core.embeddings.tables"),
        label=f"the embedding {spec.name}",
    )
    return build_or_get(recipe, build)


def _embed_in_container(spec: EmbeddingSpec, published: Path) -> Path:
    """Make an embedding whose kind is `container`, and check it; the artifact's folder of embedding.parquet.

    published: the artifact of the files that it is made of, such as the weights of a protein model. Raises UserError if
    what the container wrote is no embedding, and ModelFailed if the container fails.
    """
    from core.embeddings.tables import read_foreign_embedding, write_embedding

    container, what = find_container_of(spec), f"embedding {spec.name}"
    report_progress = make_progress_reporter(what)

    def take_event(event: Mapping[str, Any]) -> None:
        report_progress(event)
        log_message(what, event)

    recipe = Recipe(
        "embedding",
        {"pretrained": published},
        {"kind": spec.kind, "settings": spec.settings, "threads": THREADS},
        identify_container(container) + code_hash("core.embeddings.tables"),
        label=f"the embedding {spec.name}",
    )

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fields = {"pretrained": str(published), "settings": spec.settings, "output": scratch}
            run_stage("embed", container, what, fields, take_event, spec.time_limit or LONGEST_S, recipe.key)
            table = read_foreign_embedding(Path(scratch) / EMBEDDING)
        write_embedding(table, folder / EMBEDDING)

    return build_or_get(recipe, build)


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
    return _make_once({}, spec, None, inputs, [])


def _make_once(
    kept: dict[tuple[str, Path | None], Path],
    spec: EmbeddingSpec,
    fold: Path | None,
    inputs: Mapping[str, Path],
    perturbed: list[str],
) -> Path:
    """Make an embedding, from its parts if it has any, unless it is among those that are kept."""
    key = (spec.name, fold if spec.per_fold else None)
    if key not in kept:
        if spec.form == "tables":
            parts = open_catalog().parts(spec)
            made = {part.name: _make_once(kept, part, fold, inputs, perturbed) for part in parts}
            kept[key] = join_embeddings(spec, made)
        else:
            kept[key] = embed(spec, key[1] or inputs[spec.pretrained or spec.name], perturbed)
    return kept[key]


def make_embeddings(
    models: Iterable[ResolvedModel], data: Mapping[int, Path], inputs: Mapping[str, Path], perturbed: list[str]
) -> dict[tuple[str, int], Path | None]:
    """Make the embeddings of models, each once; (model, fold) -> its artifact's folder, None for a model without one.

    data: the folds' artifacts. inputs: of `fetch_inputs`. perturbed: the genes that models will need. Raises
    UserError if a model's embedding has none of them.
    """
    from core.embeddings.tables import list_known_genes, require_coverage

    kept: dict[tuple[str, Path | None], Path] = {}
    made: dict[tuple[str, int], Path | None] = {}
    for model in models:
        spec = model.embedding
        for fold, cells in data.items():
            folder = made[model.name, fold] = _make_once(kept, spec, cells, inputs, perturbed) if spec else None
            if folder and spec:
                require_coverage(spec.name, list_known_genes(folder / EMBEDDING), perturbed)
    return made
