"""Where a raw file comes from: named by the user, downloaded, or simulated."""

from __future__ import annotations

from pathlib import Path

import httpx
from prefect import task

from blocks.code import code_hash
from blocks.paths import downloads_folder
from core.catalog.schema import DatasetSpec, EmbeddingSpec, HttpsSource, SimulatedSource
from core.errors import UserError
from tasks.artifacts import LOG, checksum, made
from tasks.inputs import check_sources, named_source

CHUNK = 1 << 20


def passing(task_: object, run: object, state: object) -> bool:
    """Whether a failure may pass: a broken connection may, bad input never does."""
    error = state.result(raise_on_failure=False)  # type: ignore[attr-defined]
    return isinstance(error, httpx.TransportError | ConnectionError | TimeoutError) or (
        isinstance(error, httpx.HTTPStatusError) and error.response.status_code >= 500
    )


@task(name="fetch-source", retries=4, retry_delay_seconds=[2, 10, 30, 60], retry_condition_fn=passing)
def fetch_source(spec: DatasetSpec | EmbeddingSpec, sources: dict[str, str]) -> Path:
    """The raw file of a data set or embedding, on this machine.

    Raises UserError where it must be named and is not, or does not have the entry's checksum.
    """
    check_sources([spec], {name: file for name, file in sources.items() if name == spec.name})
    named = named_source(spec.name, sources)
    if named is not None:
        return named
    if isinstance(spec.source, SimulatedSource):
        return simulated(spec.source)
    if not isinstance(spec.source, HttpsSource):
        raise UserError(f"catalog entry {spec.name}", "source", "none", "give the entry a source")
    return downloaded(spec.name, spec.source)


def simulated(source: SimulatedSource) -> Path:
    """The raw file of a simulated screen, from the store."""
    from core.simulate import SimulationSettings, simulate

    settings = SimulationSettings.model_validate(source.settings)

    def build(folder: Path) -> None:
        simulate(settings).cells.write_h5ad(folder / "raw.h5ad", compression="gzip")

    recipe = settings.model_dump(mode="json")
    return (
        made("simulation", build, inputs={}, parameters={"settings": recipe}, code=code_hash("core.simulate"))
        / "raw.h5ad"
    )


def downloaded(name: str, source: HttpsSource) -> Path:
    """The file behind an https source, from the downloads folder or freshly fetched.

    It appears under its name only when it is whole and, where the entry has a checksum, right.
    """
    target = downloads_folder() / name / source.url.rsplit("/", 1)[-1]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(target.suffix + ".part")
        LOG.info("downloading %s", source.url)
        with httpx.stream("GET", source.url, follow_redirects=True, timeout=60) as answer:
            answer.raise_for_status()
            expected = int(answer.headers.get("content-length", 0))
            with part.open("wb") as file:
                for chunk in answer.iter_bytes(CHUNK):
                    file.write(chunk)
                received = answer.num_bytes_downloaded
        if expected and received != expected:
            raise ConnectionError(f"{source.url}: {received} of {expected} bytes arrived")
        part.replace(target)
    if source.sha256 is not None and checksum(target) != source.sha256:
        raise UserError(
            target, "sha256", checksum(target), f"the entry expects {source.sha256}: delete the file and run again"
        )
    return target
