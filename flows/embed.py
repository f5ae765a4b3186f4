"""A gene embedding that is the same for all data sets, made before any benchmark needs it."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from blocks.config.catalog import open_catalog
from core.errors import UserError
from flows.parameters import Embedding, Sources
from tasks.embed import make_shared_embedding
from tasks.inputs import list_embedding_inputs
from tasks.preflight import check_needs
from tasks.sources import fetch_inputs


@flow(name="embed", flow_run_name="embed-{embedding}")
def embed(embedding: Embedding, sources: Sources = {}) -> Path:
    """Make a gene embedding that is shared by all data sets; benchmarks find it again.

    embedding: a name of the catalog.
    sources: files to use instead of downloads, by the name of the embedding or of one of its parts; a folder, by the
        name of the published files that it is made of.
    Returns the folder of embedding.parquet in the store. Raises UserError for one that each data set or fold makes.
    """
    spec = open_catalog().embedding(embedding)
    if not spec.is_shared:
        how = "from the training cells of a fold" if spec.per_fold else "between the genes that a data set perturbs"
        remedy = "benchmark a model that uses it: it is made then"
        raise UserError(f"catalog entry {embedding}", "kind", f"an embedding that is made {how}", remedy)
    needed = list_embedding_inputs(spec)
    files = check_needs(needed, sources, [], [spec])
    # Which genes a data set perturbs is not known here: the benchmark checks that there are any.
    return make_shared_embedding(spec, fetch_inputs(needed, files))
