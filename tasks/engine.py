"""The engine that runs models and makers of embeddings, where their containers lie, and what they compute on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from blocks.config.catalog import open_catalog
from blocks.config.settings import read_settings
from blocks.engines.base import Engine, Stage, Usage
from blocks.engines.checkpoints import checkpoint
from blocks.engines.lines import Event
from blocks.engines.process import ProcessEngine
from blocks.local.gpus import Gpu, lease_gpu
from core.catalog.schema import EmbeddingSpec, ResolvedModel
from core.errors import UserError
from tasks.artifacts import Recipe, build_or_get
from tasks.inputs import collect_error, find_container, raise_collected

THREADS = 1  # bits may change with the number of threads; folds run beside each other instead


def choose_engine() -> Engine:
    """Return the engine in use: CALIPERT_ENGINE, by default `process`. Raises UserError for an unknown name."""
    name = read_settings().engine
    if name == "docker":
        from blocks.engines.docker.engine import DockerEngine

        return DockerEngine()
    if name == "kubernetes":
        from blocks.engines.kubernetes.engine import KubernetesEngine

        return KubernetesEngine()
    return ProcessEngine()


def runs_elsewhere() -> bool:
    """Whether models run on other machines, so that no GPU of this one is leased for them."""
    return read_settings().engine == "kubernetes"


@cache
def identify_container(container: Path) -> str:
    """Return what a container's results follow from: its identity under the engine in use, as it is at the first call.

    container: a folder under model_containers.
    """
    return choose_engine().identity(container)


def require_unchanged(container: Path) -> None:
    """Raise UserError if a container has changed since this process first looked at it.

    What it makes would be kept under the key of the former one.
    """
    if choose_engine().identity(container) != identify_container(container):
        remedy = "let the flow run end before you change a model, and start it again now"
        raise UserError(f"model {container.name}", "folder or image", "changed while the flow runs", remedy)


def run_stage(
    stage: Stage,
    container: Path,
    name: str,
    spec: Mapping[str, Any],
    on_event: Callable[[Event], None],
    limit_s: float,
    key: str | None = None,
) -> Usage:
    """Run a stage of a container under the engine in use, on a leased GPU of this machine if it runs here and uses one.

    name: what it works on; others who wait for a GPU see it. spec: without what follows from the machine. limit_s: of
    wall clock. key: of the artifact that the stage makes, where it can go on from a checkpoint. Raises as
    `require_unchanged` and `Engine.run` do.
    """
    require_unchanged(container)
    no_gpu = runs_elsewhere() or not _uses_gpu(container)
    lease: AbstractContextManager[Gpu | None] = nullcontext() if no_gpu else lease_gpu(name)
    with lease as gpu, open_checkpoint(key) as checkpoint_folder:
        require_unchanged(container)  # once more: it may have waited for hours
        whole = {**spec, "threads": THREADS, **({"checkpoint": checkpoint_folder} if key else {})}
        return choose_engine().run(stage, container, whole, on_event=on_event, timeout_s=limit_s, gpu=gpu)


def check_containers(models: Sequence[ResolvedModel], embeddings: Iterable[EmbeddingSpec] = ()) -> None:
    """Check, before any work, that the engine in use can run all models and what makes their embeddings.

    embeddings: beside those of the models. Raises UserError that names all that lack a folder, an image or a package.
    """
    entries: list[ResolvedModel | EmbeddingSpec] = list(models)
    specs = [*embeddings, *(model.embedding for model in models if model.embedding)]
    entries += [part for spec in specs for part in open_catalog().parts(spec)]
    errors: list[UserError] = []
    for entry in {entry.container: entry for entry in entries if entry.container}.values():
        with collect_error(errors):
            identify_container(find_container_of(entry))
    raise_collected(errors)


def find_container_of(entry: ResolvedModel | EmbeddingSpec) -> Path:
    """Return the folder of a model, or of what makes an embedding. Raises UserError if there is none."""
    if entry.container is None:
        raise ValueError(f"{entry.name} is computed by the project itself and has no container")
    return find_container(entry.container, f"catalog entry {entry.name}")


@contextmanager
def open_checkpoint(key: str | None) -> Iterator[str | None]:
    """Open the folder from which a killed stage goes on (blocks.engines.checkpoints).

    It is None without a key, and if models run on other machines. key: of the artifact that the stage makes.
    """
    if key is None or runs_elsewhere():
        yield None
        return
    with checkpoint(key) as folder:
        yield str(folder)


def _uses_gpu(container: Path) -> bool:
    def build(folder: Path) -> None:
        description = choose_engine().describe(container)
        (folder / "describe.json").write_text(json.dumps(asdict(description), sort_keys=True), encoding="utf-8")

    label = f"the description of {container.name}"
    recipe = Recipe("description", {}, {"container": container.name}, identify_container(container), label)
    found = build_or_get(recipe, build) / "describe.json"
    return bool(json.loads(found.read_text(encoding="utf-8"))["gpu"])
