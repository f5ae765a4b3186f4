"""The contract's tests of a model's folder, under any engine that runs models on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd

from blocks.engines.base import Engine, ModelFailed, Stage
from blocks.engines.lines import Event
from blocks.local.gpus import Gpu, lease_gpu
from core.catalog.schema import Form
from core.conditions import genes_of
from core.errors import UserError, shown
from core.scoring.predictions import check_model_output
from flows.cli.model_panel import GENES, NO_EMBEDDING, UNSEEN, ZERO_EMBEDDING, Panel, write_panel
from model_containers.contract import Description, Key

FILES = ("Dockerfile", "README.md", "model.py", "requirements.txt")
COVARIATES = ("K562", "RPE1")
# A model that hangs must end.
LIMIT_S = 1800.0


class Finding(NamedTuple):
    """One thing that the contract asks. fault: what is wrong, None where it is met."""

    asked: str
    fault: str | None


def check_model(folder: Path, engine: Engine, form: Form, hyperparameters: Mapping[str, Any]) -> Iterator[Finding]:
    """Check what the contract asks of the model in a folder, one finding after the other.

    The model is trained and asked twice on a small simulated fold. Ends early if a stage fails: the rest cannot be
    checked. form: of the embedding that the model gets, if it needs one. Raises UserError if the engine cannot run the
    model, and for a container that makes embeddings and trains nothing.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    yield Finding("its folder is whole", f"there is no {', '.join(missing)}" if missing else None)
    try:
        description = engine.describe(folder)
    except ModelFailed as error:
        engine.identity(folder)  # packages that are missing explain more than the model's own error
        yield Finding("it describes itself", str(error))
        return
    named = description.name == folder.name
    yield Finding(
        "it describes itself, by its folder's name",
        None if named else f"it calls itself {description.name!r}, and its folder is {folder.name!r}",
    )
    if description.input == "files":
        remedy = "make one, by the flow `embed`: its output is checked there (docs/models.md)"
        raise UserError(f"model {folder.name}", "input", "'files': it makes embeddings, and is no model", remedy)
    engine.identity(folder)  # what the engine cannot run is refused
    what = f"check of {folder.name}"
    lease: AbstractContextManager[Gpu | None] = lease_gpu(what) if description.gpu else nullcontext()
    with TemporaryDirectory() as scratch, lease as gpu:
        place = Path(scratch)
        place.chmod(0o755)
        (place / "panel").mkdir()
        panel = write_panel(place / "panel", COVARIATES)
        check = _Check(folder, engine, gpu, panel, description, form, hyperparameters)
        yield from _check_stages(check, place)


def _check_stages(check: _Check, place: Path) -> Iterator[Finding]:
    before = _hash_files(check.panel.folder)
    try:
        check.run_twice(place)
    except ModelFailed as error:
        yield Finding("it trains and predicts", str(error))
        return
    yield Finding("it trains and predicts", None)
    changed = _hash_files(check.panel.folder) != before
    yield Finding("it leaves its input alone", "it has changed files of its input" if changed else None)
    yield Finding("its progress reaches its end", _find_unfinished(check.events))
    output = place / "output_1"
    yield Finding("it answers every condition, with finite means of log1p", _find_wrong_output(output, check))
    yield Finding("it leaves out what it cannot know, and nothing else", _find_wrongly_left_out(output, check))
    same = all(_hash_files(place / f"{kind}_1") == _hash_files(place / f"{kind}_2") for kind in ("model", "output"))
    fault = "a second run wrote other files, asked for the conditions in the opposite order"
    yield Finding("the same input gives the same bytes", None if same else fault)
    yield Finding("it refuses a hyperparameter that it does not know", check.find_leniency(place))


@dataclass(frozen=True)
class _Check:
    """A model and the panel that it is trained and asked on. events: what the model has sent."""

    folder: Path
    engine: Engine
    gpu: Gpu | None
    panel: Panel
    description: Description
    form: Form
    hyperparameters: Mapping[str, Any]
    events: list[Event] = field(default_factory=list)

    def run_twice(self, place: Path) -> None:
        """Train and predict twice, the second time with the conditions in the opposite order."""
        for number, order in ((1, 1), (2, -1)):
            model, output = place / f"model_{number}", place / f"output_{number}"
            conditions = [key._asdict() for key in self.panel.held_out][::order]
            self._stage("train", model, cells=self._file("train.h5ad"), hyperparameters=self.hyperparameters)
            self._stage("predict", output, model=str(model), control=self._file("control.h5ad"), conditions=conditions)

    def find_leniency(self, place: Path) -> str | None:
        """Say how it accepts an unknown hyperparameter; None if it refuses it as the contract wants."""
        unknown = {"no_such_hyperparameter": 1}
        try:
            self._stage("train", place / "refused", cells=self._file("train.h5ad"), hyperparameters=unknown)
        except ModelFailed as error:
            return None if error.exit_code == 2 else f"it should end with exit code 2 and one line: {error}"
        return "it took `no_such_hyperparameter`: a typing error in the catalog would change nothing"

    def _stage(self, stage: Stage, output: Path, **fields: Any) -> None:
        output.mkdir()
        table = self._file("graph.parquet" if self.form == "graph" else "embedding.parquet")
        embedding = table if self.description.embedding else None
        spec = fields | {"embedding": embedding, "seed": 1, "output": str(output)}
        self.engine.run(stage, self.folder, spec, on_event=self.events.append, timeout_s=LIMIT_S, gpu=self.gpu)

    def _file(self, name: str) -> str:
        return str(self.panel.folder / name)


def _find_unfinished(events: list[Event]) -> str | None:
    last = next((event for event in reversed(events) if event["event"] == "progress"), None)
    if last is None:
        return "it reports no progress"
    return None if last["done"] == last["total"] else f"its last was {last['done']} of {last['total']} {last['unit']}"


def _find_wrong_output(output: Path, check: _Check) -> str | None:
    try:
        check_model_output(output, [key._asdict() for key in check.panel.held_out], pd.Index(GENES), check.folder.name)
    except UserError as error:
        return str(error)
    return None


def _find_wrongly_left_out(output: Path, check: _Check) -> str | None:
    """Compare what is left out with what the model says that it can do."""
    try:
        rows = json.loads((output / "unpredicted.json").read_text(encoding="utf-8"))
        left_out = {Key(row["covariate"], row["condition"]) for row in rows}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"unpredicted.json: {type(error).__name__}: {error}"
    expected = {key for key in check.panel.held_out if _is_beyond(key, check.description)}
    wrong = [(key, "is predicted, and cannot be") for key in sorted(expected - left_out)]
    wrong += [(key, "is not predicted, and can be") for key in sorted(left_out - expected)]
    return shown([f"{key.condition} in {key.covariate} {fault}" for key, fault in wrong], 3) or None


def _is_beyond(key: Key, description: Description) -> bool:
    genes = genes_of(key.condition)
    return (
        key.covariate == UNSEEN
        or (len(genes) > 1 and not description.combinations)
        or (description.embedding and bool({NO_EMBEDDING, ZERO_EMBEDDING} & set(genes)))
    )


def _hash_files(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}
