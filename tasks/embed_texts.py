"""Embeddings of texts about genes: a service makes a vector of each text, and is paid for it once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from time import sleep

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE

from blocks.config.catalog import open_catalog
from blocks.config.paths import vectors_folder
from blocks.config.secrets import read_secret
from blocks.http import TASK_RETRY_DELAYS, ConnectionLost
from blocks.services.text_service import read_service_key, request_vectors
from blocks.services.vectors import Vector, build_address, name_vector, read_vector, write_vectors
from blocks.store.code import code_hash
from core.catalog.schema import GENE_FILES, EmbeddingSpec, TextService
from core.embeddings.files import EMBEDDING
from core.errors import UserError
from tasks.artifacts import LOG, Recipe, build_or_get, checksum_file, find_artifact
from tasks.inputs import collect_error, raise_collected
from tasks.progress import make_progress_reporter
from tasks.sources import find_files, retry_up_to

KIND = "embedding"
SUMMARIES, GENES = GENE_FILES
# OpenAI takes 2,048 texts and 300,000 tokens at once; a token is a byte at least. What a kill loses is one such list.
TEXTS_AT_ONCE, BYTES_AT_ONCE = 128, 250_000
BYTES_OF_A_TOKEN = 4  # in English, about
RETRIES = len(TASK_RETRY_DELAYS)
LONGEST_WAIT = 120.0  # seconds: the longest wait before the next try that a service may ask for


def embed_texts(spec: EmbeddingSpec, published: Path) -> Path:
    """Make an embedding whose kind is `text`; the artifact's folder of embedding.parquet.

    published: the artifact of the files with the texts. Raises UserError if the service's key is missing or refused,
    or an answer is not what was asked for, and ConnectionLost if the service stays out of reach; vectors that came
    before are kept, and the next run asks for the others.
    """
    from core.embeddings.gene_texts import embed_texts, read_gene_texts
    from core.embeddings.tables import write_embedding

    def build(folder: Path) -> None:
        texts = read_gene_texts(published / SUMMARIES, published / GENES)
        write_embedding(embed_texts(texts, _collect_vectors(spec, sorted(set(texts.values())))), folder / EMBEDDING)

    return build_or_get(_recipe(spec, {name: published / name for name in (SUMMARIES, GENES)}), build)


def check_services(specs: Iterable[EmbeddingSpec], files: Mapping[str, Path]) -> None:
    """Raise UserError, before any work, if an embedding needs vectors of a service and the service's key is missing.

    specs: embeddings of any kind. files: what the user has (tasks.inputs.resolve_sources). An embedding that is in the
    store, or whose vectors are all kept, needs no key.
    """
    parts = {part.name: part for spec in specs for part in open_catalog().parts(spec)}
    errors: list[UserError] = []
    for part in parts.values():
        if part.service and read_secret(part.service.secret) is None and _must_ask(part, files):
            with collect_error(errors):
                read_service_key(part.service)
    raise_collected(errors)


def _must_ask(spec: EmbeddingSpec, files: Mapping[str, Path]) -> bool:
    from core.embeddings.gene_texts import read_gene_texts

    published = open_catalog().pretrained(str(spec.pretrained))
    found = find_files(published, files.get(published.name))
    if found is None:
        return True  # the address gives other files every day, with texts that the service has not been asked for
    if find_artifact(_recipe(spec, found)):
        return False
    texts = set(read_gene_texts(found[SUMMARIES], found[GENES]).values())
    return any(_find_vector(spec, text) is None for text in texts)


def _recipe(spec: EmbeddingSpec, files: Mapping[str, Path]) -> Recipe:
    """Return the embedding's recipe. Its inputs are the files' content, so that no text is paid for twice."""
    service = _service(spec)
    return Recipe(
        KIND,
        {name: checksum_file(files[name]) for name in (SUMMARIES, GENES)},
        {
            "kind": spec.kind,
            "service": {"address": build_address(service), "model": service.model},
            "dimensions": spec.dimensions,
        },
        code_hash("core.embeddings.gene_texts") + code_hash("core.embeddings.tables"),
        label=f"the embedding {spec.name}",
    )


def _service(spec: EmbeddingSpec) -> TextService:
    if spec.service is None:
        raise ValueError(f"{spec.name} is made without a service")
    return spec.service


def _collect_vectors(spec: EmbeddingSpec, texts: list[str]) -> dict[str, Vector]:
    """Return text -> vector; those that are not kept are asked for first. texts: sorted, each once.

    Raises UserError if one that was answered is not there afterwards.
    """
    from core.embeddings.gene_texts import split_batches

    service = _service(spec)
    found = {text: _find_vector(spec, text) for text in texts}
    unknown = [text for text, vector in found.items() if vector is None]
    if unknown:
        read_service_key(service)
        tokens = sum(len(text.encode()) for text in unknown) // BYTES_OF_A_TOKEN
        LOG.info(
            "embedding %s: %s of %s texts are asked of %s (model %s), about %s tokens; it may charge for them",
            *(spec.name, f"{len(unknown):,}", f"{len(texts):,}", service.url, service.model, f"{tokens:,}"),
        )
        report_progress = make_progress_reporter(f"embedding {spec.name}")
        done = 0
        for batch in split_batches(unknown, TEXTS_AT_ONCE, BYTES_AT_ONCE):
            ask_for_vectors(spec, batch)
            done += len(batch)
            report_progress({"event": "progress", "done": done, "total": len(unknown), "unit": "text"})
        found |= {text: _find_vector(spec, text) for text in unknown}
    vectors = {text: vector for text, vector in found.items() if vector is not None}
    if len(vectors) < len(texts):
        lost = f"{len(texts) - len(vectors):,} that were answered are gone or damaged"
        remedy = "leave the folder alone while a run needs it, and run again: only these are asked for"
        raise UserError(vectors_folder(), "vectors", lost, remedy)
    return vectors


def _find_vector(spec: EmbeddingSpec, text: str) -> Vector | None:
    return read_vector(name_vector(_service(spec), spec.dimensions, text), spec.dimensions)


@task(
    name="ask-text-service",
    task_run_name="ask for {spec.name}",
    cache_policy=NO_CACHE,
    **retry_up_to(RETRIES),
)
def ask_for_vectors(spec: EmbeddingSpec, texts: list[str]) -> None:
    """Ask for the vectors of texts, by one request, and keep them.

    Raises UserError as `request_vectors` does, and ConnectionLost if another try may help: if one is to come, after as
    long a wait as the service asks for.
    """
    service = _service(spec)
    try:
        vectors = request_vectors(service, spec.dimensions, texts)
    except ConnectionLost as busy:
        if runtime.task_run.run_count <= RETRIES:
            sleep(min(busy.wait, LONGEST_WAIT))
        raise
    names = [name_vector(service, spec.dimensions, text) for text in texts]
    write_vectors(dict(zip(names, vectors, strict=True)))
