"""Where a raw file comes from: named by the user, downloaded, or simulated."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from urllib.parse import urlsplit

import filelock
import httpx
from prefect import task

from blocks.code import code_hash
from blocks.paths import downloads_folder, store_folder
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

    It appears under its name only when it is whole; callers that want it at the same time fetch it once. An address
    that has changed is another file. Raises UserError where it does not have the entry's checksum.
    """
    target = _target(name, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / ".lock"):
        if not target.exists():
            # Under the lock nobody writes any: they are what killed downloads left.
            for left in target.parent.glob("*.part"):
                left.unlink()
            LOG.info("downloading %s", source.url)
            _download(source.url, target)
    if source.sha256 is not None and (found := checksum(target)) != source.sha256:
        raise UserError(target, "sha256", found, f"the entry expects {source.sha256}: delete the file and run again")
    return target


def described(spec: DatasetSpec | EmbeddingSpec, raw: Path) -> str:
    """Where a raw file of `fetch_source` comes from, without a path of this machine: the address of a download,
    "simulated", or the name of the user's file."""
    if isinstance(spec.source, HttpsSource) and raw == _target(spec.name, spec.source):
        return spec.source.url
    if isinstance(spec.source, SimulatedSource) and raw.is_relative_to(store_folder()):
        return "simulated"
    return raw.name


def _target(name: str, source: HttpsSource) -> Path:
    address = sha256(source.url.encode()).hexdigest()[:12]
    return downloads_folder() / name / address / (PurePosixPath(urlsplit(source.url).path).name or "download")


def _download(url: str, target: Path) -> None:
    """Fetch into a file that no other process writes, then name it. Raises ConnectionError if bytes are missing."""
    with NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as file:
        part = Path(file.name)
        try:
            with httpx.stream("GET", url, follow_redirects=True, timeout=60) as answer:
                answer.raise_for_status()
                for chunk in answer.iter_bytes(CHUNK):
                    file.write(chunk)
                expected = int(answer.headers.get("content-length", 0))
                received = answer.num_bytes_downloaded
            if expected and received != expected:
                raise ConnectionError(f"{url}: {received} of {expected} bytes arrived")
            file.flush()
            # Temporary files are readable by their owner only.
            part.chmod(0o644)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
