"""Where a raw file comes from: named by the user, downloaded, or simulated."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import filelock
from prefect import runtime, task

from blocks.config.paths import downloads_folder, store_folder
from blocks.http import TASK_RETRY_DELAYS, ConnectionLost
from blocks.store.code import code_hash
from core.catalog.schema import (
    DatasetSpec,
    EmbeddingSpec,
    HttpsSource,
    LocalSource,
    PretrainedSpec,
    S3Source,
    SimulatedSource,
)
from core.errors import UserError
from tasks.artifacts import LOG, checksum, made
from tasks.downloads import download, is_download_transient, write_whole
from tasks.inputs import check_sources, named_source

DISK = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "quota used up",
    errno.EACCES: "no permission to write",
    errno.EROFS: "read-only",
}


def passing(task_: object, run: object, state: object) -> bool:
    """Whether a failed try to fetch a file is worth another: a lost connection is, bad input never."""
    error = state.result(raise_on_failure=False)  # type: ignore[attr-defined]
    again = isinstance(error, ConnectionLost)
    if again:
        LOG.warning("%s: %s; trying again", error.where, error.found)
    return again


@task(name="fetch-source", retries=4, retry_delay_seconds=TASK_RETRY_DELAYS[:4], retry_condition_fn=passing)
def fetch_source(spec: DatasetSpec | EmbeddingSpec, sources: dict[str, str]) -> Path:
    """The raw file of a data set or embedding, on this machine.

    Raises UserError where it must be named and is not, or does not have the entry's checksum; ConnectionLost where
    another try may help.
    """
    check_sources([spec], {name: file for name, file in sources.items() if name == spec.name})
    named = named_source(spec, sources)
    if named is not None:
        return named
    if isinstance(spec.source, SimulatedSource):
        return simulated(spec.source)
    if not isinstance(spec.source, HttpsSource | S3Source):
        raise UserError(f"catalog entry {spec.name}", "source", "none", "give the entry a source")
    if not _target(spec.name, spec.source).exists() and runtime.task_run.run_count <= 1:
        LOG.info("%s: to fetch %s; licence: %s; to cite: %s", spec.name, spec.source.url, spec.licence, spec.citation)
    return _fetched(spec.name, spec.source, "FILE")


def fetch_files(spec: PretrainedSpec) -> dict[str, Path]:
    """Published files on this machine, by their names. Raises as `fetch_source` does."""
    check_sources([spec], {})
    return {name: _fetched(spec.name, source, "FOLDER") for name, source in _addresses(spec).items()}


def _addresses(spec: PretrainedSpec) -> dict[str, HttpsSource | S3Source]:
    return {name: source for name, source in sorted(spec.files.items()) if not isinstance(source, LocalSource)}


def files_here(spec: PretrainedSpec, sources: Mapping[str, str]) -> dict[str, Path] | None:
    """The files of an entry, by their names, where all are on this machine: in the folder that the user named, or
    downloaded before; else None. Raises UserError for a folder that is not as it must be."""
    named = named_source(spec, sources)
    if named is not None:
        return {name: named / name for name in sorted(spec.files)}
    files = {name: _target(spec.name, source) for name, source in _addresses(spec).items()}
    return files if len(files) == len(spec.files) and all(file.exists() for file in files.values()) else None


def _fetched(name: str, source: HttpsSource | S3Source, wanted: str) -> Path:
    try:
        return downloaded(name, source)
    except Exception as error:
        if not is_download_transient(error):
            raise
        remedy = f"run again: it goes on where it broke off. Or name it yourself: --source {name}={wanted}"
        raise ConnectionLost(source.url, "connection", f"{type(error).__name__}: {error}", remedy) from error


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


def downloaded(name: str, source: HttpsSource | S3Source) -> Path:
    """The file behind a public address, from the downloads folder or freshly fetched.

    It appears under its name only when it is whole; callers that want it at the same time fetch it once. An address
    that has changed is another file. Its checksum is recorded beside it at the first download, and it is checked at
    every use against the entry's, else the recorded one. Raises UserError where it does not fit.
    """
    target = _target(name, source)
    recorded = target.with_name(f"{target.name}.sha256")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target):
        if not target.exists():
            # A record without its file is that of a former one.
            recorded.unlink(missing_ok=True)
            _download(source, target)
        found = checksum(target)
        if not recorded.exists() or not recorded.read_text(encoding="utf-8").strip():
            write_whole(recorded, f"{found}  {target.name}\n")
    expected = source.sha256 or recorded.read_text(encoding="utf-8").split()[0]
    if found != expected:
        whose = "the entry expects" if source.sha256 else "at its first download it had"
        raise UserError(target, "sha256", found, f"{whose} {expected}: delete the file and run again")
    return target


def _download(source: HttpsSource | S3Source, target: Path) -> None:
    try:
        download(source, target)
    except OSError as error:
        if error.errno not in DISK:
            raise
        remedy = "mend that, or name another data folder (environment CALIPERT_DATA); what has arrived is kept"
        raise UserError(target.parent, "folder of downloads", DISK[error.errno], remedy) from error


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """A context that one caller at a time is in, on this machine."""
    lock = filelock.FileLock(target.parent / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        LOG.info("%s is being fetched or checked elsewhere: waiting for it", target.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def described(spec: DatasetSpec | EmbeddingSpec, raw: Path) -> str:
    """Where a raw file of `fetch_source` comes from, without a path of this machine: the address of a download,
    "simulated", or the name of the user's file."""
    if isinstance(spec.source, HttpsSource | S3Source) and raw == _target(spec.name, spec.source):
        return spec.source.url
    if isinstance(spec.source, SimulatedSource) and raw.is_relative_to(store_folder()):
        return "simulated"
    from core.prepare.mirror import has_mirror_layout

    return f"{raw.name} (layout of a preprocessed mirror)" if has_mirror_layout(raw) else raw.name


def _target(name: str, source: HttpsSource | S3Source) -> Path:
    place = getattr(source, "endpoint", None) or ""
    address = sha256(f"{place}{source.url}".encode()).hexdigest()[:12]
    return downloads_folder() / name / address / (PurePosixPath(urlsplit(source.url).path).name or "download")
