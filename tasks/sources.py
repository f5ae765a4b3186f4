"""Where a raw file comes from: named by the user, downloaded, or simulated."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE

from blocks.config.paths import downloads_folder, store_folder
from blocks.http import TASK_RETRY_DELAYS, ConnectionLost
from blocks.local.files import lock_file
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
from tasks.artifacts import LOG, Recipe, build_or_get, checksum_file
from tasks.downloads import download, is_download_transient, write_whole
from tasks.inputs import require_public

DISK = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "quota used up",
    errno.EACCES: "no permission to write",
    errno.EROFS: "read-only",
}


def is_worth_a_retry(task_: object, run: object, state: object) -> bool:
    """Whether a failed try to fetch a file is worth another: a lost connection is, bad input never."""
    error = state.result(raise_on_failure=False)  # type: ignore[attr-defined]
    if not isinstance(error, ConnectionLost):
        return False
    LOG.warning("%s: %s; trying again", error.where, error.found)
    return True


def retry_up_to(times: int) -> dict[str, Any]:
    """Return the options of a task that is tried again while `is_worth_a_retry`."""
    delays = TASK_RETRY_DELAYS[:times]
    return {"retries": times, "retry_delay_seconds": delays, "retry_condition_fn": is_worth_a_retry}


@task(name="fetch-source", **retry_up_to(4))
def fetch_source(spec: DatasetSpec | EmbeddingSpec, file: Path | None = None) -> Path:
    """Return the raw file of a data set or embedding, on this machine.

    file: the user's own, if there is one. Raises UserError if there must be one and is none, or the raw file does not
    have the entry's checksum; ConnectionLost if another try may help.
    """
    if file is not None:
        return file
    require_public(spec)
    if isinstance(spec.source, SimulatedSource):
        return simulate_source(spec.source)
    if not isinstance(spec.source, HttpsSource | S3Source):
        raise UserError(f"catalog entry {spec.name}", "source", "none", "give the entry a source")
    if not _target(spec.name, spec.source).exists() and runtime.task_run.run_count <= 1:
        LOG.info("%s: to fetch %s; licence: %s; to cite: %s", spec.name, spec.source.url, spec.licence, spec.citation)
    return _fetch(spec.name, spec.source, "FILE")


@task(name="fetch-weights", task_run_name="fetch {spec.name}", cache_policy=NO_CACHE, **retry_up_to(4))
def fetch_pretrained(spec: PretrainedSpec, folder: Path | None = None) -> Path:
    """Return the artifact's folder of published files, under the names of the entry.

    folder: the user's own, if there is one. Raises UserError and ConnectionLost as `fetch_source` does.
    """
    if folder is None:
        LOG.info("%s: %s; licence: %s; to cite: %s", spec.name, spec.title, spec.licence, spec.citation)
        require_public(spec)
        files = {name: _fetch(spec.name, source, "FOLDER") for name, source in _addresses(spec).items()}
    else:
        files = _name_files(spec, folder)

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


def _name_files(spec: PretrainedSpec, folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in sorted(spec.files)}


def _addresses(spec: PretrainedSpec) -> dict[str, HttpsSource | S3Source]:
    return {name: source for name, source in sorted(spec.files.items()) if not isinstance(source, LocalSource)}


def find_files(spec: PretrainedSpec, folder: Path | None) -> dict[str, Path] | None:
    """Return the files of an entry by their names, None unless all are on this machine.

    folder: the user's own, if there is one; without it, the files are those that were downloaded before.
    """
    if folder is not None:
        return _name_files(spec, folder)
    files = {name: _target(spec.name, source) for name, source in _addresses(spec).items()}
    return files if len(files) == len(spec.files) and all(file.exists() for file in files.values()) else None


def _fetch(name: str, source: HttpsSource | S3Source, wanted: str) -> Path:
    try:
        return download_once(name, source)
    except Exception as error:
        if not is_download_transient(error):
            raise
        remedy = f"run again: it goes on where it broke off. Or name it yourself: --source {name}={wanted}"
        raise ConnectionLost(source.url, "connection", f"{type(error).__name__}: {error}", remedy) from error


def simulate_source(source: SimulatedSource) -> Path:
    """Return the raw file of a simulated screen, from the store."""
    from core.simulate import SimulationSettings, simulate

    settings = SimulationSettings.model_validate(source.settings)

    def build(folder: Path) -> None:
        simulate(settings).cells.write_h5ad(folder / "raw.h5ad", compression="gzip")

    parameters = {"settings": settings.model_dump(mode="json")}
    return build_or_get(Recipe("simulation", {}, parameters, code_hash("core.simulate")), build) / "raw.h5ad"


def download_once(name: str, source: HttpsSource | S3Source) -> Path:
    """Return the file behind a public address, from the downloads folder or downloaded now.

    It appears under its name only when it is whole; callers that want it at the same time download it once. An address
    that has changed is another file. Its checksum is recorded beside it at the first download, and at every use it is
    checked against the entry's checksum, else the recorded one. Raises UserError if it differs.
    """
    target = _target(name, source)
    recorded = target.with_name(f"{target.name}.sha256")
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(target.parent / ".lock", f"{target.name} is being fetched or checked elsewhere"):
        if not target.exists():
            # A record without its file belongs to an earlier one.
            recorded.unlink(missing_ok=True)
            try:
                download(source, target)
            except OSError as error:
                if error.errno not in DISK:
                    raise
                remedy = "solve that, or name another data folder (environment CALIPERT_DATA); what has arrived is kept"
                raise UserError(target.parent, "folder of downloads", DISK[error.errno], remedy) from error
        found = checksum_file(target)
        if not recorded.exists() or not recorded.read_text(encoding="utf-8").strip():
            write_whole(recorded, f"{found}  {target.name}\n")
    expected = source.sha256 or recorded.read_text(encoding="utf-8").split()[0]
    if found != expected:
        whose = "the entry expects" if source.sha256 else "at its first download it had"
        raise UserError(target, "sha256", found, f"{whose} {expected}: delete the file and run again")
    return target


def describe_source(spec: DatasetSpec | EmbeddingSpec, raw: Path) -> str:
    """Say where a raw file of `fetch_source` comes from, without a path of this machine.

    That is the address of a download, "simulated", or the name of the user's file.
    """
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
