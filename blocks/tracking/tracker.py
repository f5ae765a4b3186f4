"""What is kept in MLflow: an experiment per data set, a run per model and seed, a child run per fold.

Everything here can be repeated. A run is found again by its tag `calipert.key`, a value that is already there is
not written twice, and a run that was cut off is ended by the next attempt. docs/tracking.md lists every name.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlsplit

import pandas as pd

from blocks.config.paths import scratch_folder
from blocks.config.settings import read_settings
from blocks.local.processes import is_dead, name_this_process
from blocks.local.scratch import scratch
from blocks.tracking.client import Refused, Server, ServerLost, load_mlflow
from blocks.tracking.curves import follow_curve, log_curve
from blocks.tracking.runs import (
    KEY,
    PARENT,
    WantedRun,
    end_run,
    find_with_running_children,
    fit_name,
    fit_param,
    format_param,
    map_threads,
    open_or_create_runs,
    write_values,
)
from blocks.tracking.tables import summarise_calibration, summarise_model
from core.errors import UserError
from core.report.files import REPORT

if TYPE_CHECKING:
    from mlflow.entities import Run

    from blocks.engines.base import Usage

EXPERIMENT_PREFIX = "calipert/"
# The file's name in every run of a benchmark.

_FLOW_RUN = "flow_run_id"
_PROCESS = "process"
_TRAINED_BY = "training_flow_run_id"
# What a fold's run repeats of its model's, so that one filter finds both.
_INHERITED = ("benchmark_id", "kind", "model", "dataset", "seed", "engine", "git_commit", _FLOW_RUN, _PROCESS)
_RUNNING = "attributes.status = 'RUNNING'"


class ModelRun(NamedTuple):
    """What is known of a model's run before it starts.

    seed:    the training seed; -1 for controls, which have none.
    key:     hash of what the run's results follow from (model, seed, data set, code, and the benchmark, whose panel
             its summaries depend on); the same key must come with the same params.
    kind:    "model", "baseline", "negative control" or "positive control".
    params:  hyperparameters and whatever else decides the result. Values longer than 500 characters are cut with
             their hash, and params.json has all of them whole.
    engine:  identity of what trains (image digest, or hash of the build folder); None where nothing trains.
    folds:   those that get a run of their own.
    """

    model: str
    seed: int
    key: str
    kind: str
    params: Mapping[str, object]
    engine: str | None = None
    folds: Sequence[int] = ()


class OpenRun(NamedTuple):
    """The ids of a model's run and, by fold, of those of its folds."""

    run_id: str
    folds: dict[int, str]


@dataclass(frozen=True)
class MLflowTracking(Server):
    """Writes benchmarks and calibrations to an MLflow server.

    Every method talks to the server at `tracking_uri` (for instance http://127.0.0.1:5000) and to nothing else, and
    raises UserError, naming that URL and the remedy, when the server does not answer or refuses: within about 15
    seconds where it has never answered, within about a minute where it was lost. Credentials are never part of the URL:
    MLflow's client reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment.
    """

    def __post_init__(self) -> None:
        """Raise UserError for an address that is not a server's, or holds a password."""
        parts = urlsplit(self.tracking_uri)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            found = self.tracking_uri
            remedy = (
                "give the http or https URL of an MLflow server: databases and folders that several processes write to "
                "directly get damaged"
            )
        elif parts.username or parts.password:
            found = f"a user name or password for {parts.hostname}"
            remedy = "take it out of the URL and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        else:
            return
        raise UserError("environment", "MLFLOW_TRACKING_URI", found, remedy)

    def open_runs(
        self,
        dataset: str,
        benchmark_id: str,
        models: Sequence[ModelRun],
        *,
        digest: str,
        source: str,
        flow_run_id: str | None = None,
    ) -> dict[str, OpenRun]:
        """Return model -> its run and those of its folds, RUNNING; those whose keys no run has yet are created.

        Folds that have finished before stay FINISHED.
        benchmark_id: ties these runs together; runs are looked for among those that have it.
        digest:  identifies what the runs are scored against; source: where the raw file comes from, an https URL or
                 any other name. Both become the data set input.

        Call it before any fan-out: two simultaneous callers may each create runs (the next call deletes one of them).
        """
        experiment = self._find_experiment(dataset)
        chosen = f"tags.benchmark_id = '{benchmark_id}'"
        found = self.find_runs([experiment], chosen)
        shared = {"benchmark_id": benchmark_id, "dataset": dataset, **_describe_process(flow_run_id)}
        params = {m.key: {"model": m.model, "dataset": dataset, "seed": m.seed, **m.params} for m in models}
        wanted = [_describe_run(model, shared, params[model.key]) for model in models]
        runs = open_or_create_runs(self, experiment, chosen, wanted, found)

        def describe(model: ModelRun) -> None:
            _log_params(self, runs[model.key], params[model.key])
            _log_dataset(self, runs[model.key], dataset, digest, source)

        # The first one makes the data set that the others share.
        for some in (models[:1], models[1:]):
            map_threads(describe, some)
        parts = {
            (model.model, fold): _describe_fold(each, runs[model.key].info.run_id, fold)
            for model, each in zip(models, wanted, strict=True)
            for fold in model.folds
        }
        folds = open_or_create_runs(self, experiment, chosen, list(parts.values()), found)
        opened = {}
        for model in models:
            of_folds = {fold: folds[parts[model.model, fold].key].info.run_id for fold in model.folds}
            opened[model.model] = OpenRun(runs[model.key].info.run_id, of_folds)
        return opened

    def begin_training(self, run_id: str, flow_run_id: str) -> None:
        """Say in a fold's run which flow run trains it now."""
        self.log(run_id, tags={_TRAINED_BY: flow_run_id})

    def kill_training(self, run_id: str, flow_run_id: str, reason: str) -> None:
        """End a fold's run as KILLED, as `fail` does, if this flow run was the last that began to train it.

        The end of an earlier one may be reported late.
        """
        if self.get_run(run_id).data.tags.get(_TRAINED_BY) == flow_run_id:
            self.fail(run_id, reason, "KILLED")

    def follow_curve(self, run_id: str) -> Callable[[Mapping[str, object]], None]:
        """Return a function that takes the events of a training while it runs and writes its metrics.

        The training waits meanwhile: each request has a few seconds, and a lost server is not asked again at once.
        """
        return follow_curve(replace(self, patience=0), run_id)

    def log_curve(self, run_id: str, training: Path) -> None:
        """Make a fold's run show exactly the curve of its training.jsonl (blocks.tracking.curves)."""
        log_curve(self, run_id, training)

    def log_usage(self, run_id: str, usage: Usage) -> None:
        """Write what a training took to its run.

        Metrics: `system.seconds` (wall clock), `system.cpu_seconds` and `system.peak_memory_mb` (millions of bytes).
        Tag: `device`.
        """
        took = {
            "system.seconds": usage.seconds,
            "system.cpu_seconds": usage.cpu_seconds,
            "system.peak_memory_mb": None if usage.peak_memory_bytes is None else usage.peak_memory_bytes / 1e6,
        }
        values = {name: value for name, value in took.items() if value is not None}
        write_values(self, self.get_run(run_id), values, {"device": usage.device})

    def log_leaderboard(self, leaderboard: pd.DataFrame, run_ids: Mapping[str, str]) -> None:
        """Write each model's rows of the leaderboard as metrics `<metric>.<column>` of its run.

        Columns: blocks.tracking.tables.SUMMARY_COLUMNS, in the metrics' own units, shares in [0, 1].
        run_ids: the run of each model to be written; a model without rows raises KeyError.
        NaN and infinite values are left out and named in the tag `not_finite` (a rank that a metric without a
        calibrated verdict cannot have is not named). Tags: `calibrated` lists the calibrated metrics,
        `calibrated.<metric>` and `in_panel` are "true" or "false".
        """
        by_model = dict(iter(leaderboard.groupby("model", sort=False)))
        rows = [(run_id, by_model[model].set_index("metric")) for model, run_id in run_ids.items()]
        map_threads(lambda row: write_values(self, self.get_run(row[0]), *summarise_model(row[1])), rows)

    def log_scores(self, scores: Path, run_ids: Mapping[str, str]) -> None:
        """Keep with each model's run its own rows of scores.parquet, as a file of that name.

        Of a model without rows it is an empty table.
        """
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        schema = pq.read_schema(scores).remove_metadata()
        # As words and their numbers: millions of rows hold the same few words.
        words = [field.name for field in schema if str(field.type) in ("string", "large_string")]
        table = pq.read_table(scores, read_dictionary=words)

        def keep(item: tuple[str, str]) -> None:
            model, run_id = item
            own = table.filter(pc.equal(table["model"], model)).cast(schema)
            with scratch(scratch_folder(), "mlflow") as folder:
                file = folder / scores.name
                pq.write_table(own, file)
                self.log_file(run_id, file)

        map_threads(keep, run_ids.items())

    def log_report(self, report: Path, run_ids: Iterable[str]) -> None:
        """Keep the report of a benchmark with each of these runs, as a file of that name."""
        map_threads(lambda run_id: self.log_file(run_id, report), run_ids)

    def log_calibration(
        self,
        dataset: str,
        calibration: pd.DataFrame,
        *,
        key: str,
        digest: str,
        source: str,
        params: Mapping[str, object],
        file: Path,
        flow_run_id: str | None = None,
    ) -> str:
        """Write one calibration as a run of its own, FINISHED, and return its id; repeated, it is the same run.

        calibration: the table of calibration.parquet. Metrics: `<metric>.<variant>` is the DRF, with `_low`, `_high`
        and `_half_sd`; `<metric>.bds` and its like belong to the variant that carries the verdict
        (blocks.tracking.tables). Tags: `verdict.<metric>` and `calibrated`. NaN and infinite values are left out, named
        in the tag `not_finite`.
        digest: key of the calibration. key, source, params: as in `open_runs`. file: to keep with the run.
        When something fails, the run ends as FAILED with the reason, and the error goes on.
        """
        experiment = self._find_experiment(dataset)
        chosen = f"tags.`{KEY}` = '{key}'"
        whole = {"dataset": dataset, **params}
        tags = {"kind": "calibration", "dataset": dataset, **_describe_process(flow_run_id)}
        wanted = WantedRun(key, "calibration", tags, {name: format_param(value) for name, value in whole.items()})
        run = open_or_create_runs(self, experiment, chosen, [wanted], self.find_runs([experiment], chosen))[key]
        try:
            _log_params(self, run, whole)
            _log_dataset(self, run, dataset, digest, source)
            write_values(self, run, *summarise_calibration(calibration))
            self.log_file(run.info.run_id, file)
        except ServerLost:
            # The end of the run could not be written either; the next attempt finds it.
            raise
        except BaseException as error:
            self.fail(run.info.run_id, f"{type(error).__name__}: {error}")
            raise
        run_id: str = run.info.run_id
        self.finish(run_id)
        return run_id

    def finish(self, *run_ids: str) -> None:
        """End runs of one data set, and those of their folds that are still running, as FINISHED.

        A run that had finished before keeps its first end, so that a repetition from finished artifacts does not
        stretch its duration.
        """
        map_threads(lambda run: end_run(self, run, "FINISHED"), find_with_running_children(self, run_ids))

    def fail(self, run_id: str, reason: str, status: str = "FAILED") -> None:
        """End a run, and those of its folds that are still running, as FAILED, or KILLED.

        The tag `failure` holds the reason until the run finishes.
        """
        map_threads(lambda run: end_run(self, run, status, reason), find_with_running_children(self, [run_id]))

    def end_interrupted(self, flow_run_id: str, reason: str) -> list[str]:
        """End as KILLED every run that a flow run left running which was cancelled or has crashed; return their ids."""
        left = self.find_runs(
            self.find_experiments(EXPERIMENT_PREFIX), f"{_RUNNING} and tags.`{_FLOW_RUN}` = '{flow_run_id}'"
        )
        map_threads(lambda run: end_run(self, run, "KILLED", reason), left)
        return sorted(run.info.run_id for run in left)

    def end_stale(self, dataset: str, alive: Callable[[list[str]], set[str]]) -> list[str]:
        """End as KILLED the runs of a data set that no process goes on with, and return their ids.

        These are RUNNING, and the process that opened them is known to be dead, or their flow run is not alive.
        alive: returns which of these flow runs (by id) may still be at work; called once, with all of them, or not at
        all. Runs without a flow run and of a process that cannot be checked from here are left alone.
        """
        experiment = self._find_experiment(dataset)
        running = self.find_runs([experiment], _RUNNING)
        left = [run for run in running if is_dead(run.data.tags.get(_PROCESS, ""))]
        unsure = [run for run in running if run not in left and _FLOW_RUN in run.data.tags]
        flows = {run.data.tags[_FLOW_RUN] for run in unsure}
        ended = flows - alive(sorted(flows)) if flows else set()
        left += [run for run in unsure if run.data.tags[_FLOW_RUN] in ended]

        def end_unless_taken(run: Run) -> Run | None:
            # In the meantime another flow run may have gone on with it.
            now = self.get_run(run.info.run_id)
            same = all(now.data.tags.get(tag) == run.data.tags.get(tag) for tag in (_FLOW_RUN, _PROCESS))
            if now.info.status != "RUNNING" or not same:
                return None
            end_run(self, now, "KILLED", "it was left running by a flow run that has ended")
            return now

        return sorted(run.info.run_id for run in map_threads(end_unless_taken, left) if run)

    def build_benchmark_url(self, dataset: str, benchmark_id: str) -> str:
        """Return the page that compares the models of one benchmark in charts, in the UI's mode for model training."""
        chosen = quote(f"tags.benchmark_id = '{benchmark_id}'")
        return (
            f"{self._experiment_url(dataset)}/runs"
            f"?workflowType=machine_learning&compareRunsMode=CHART&searchFilter={chosen}"
        )

    def build_report_url(self, dataset: str, run_id: str) -> str:
        """Return the page that shows the report that a run keeps."""
        return f"{self._experiment_url(dataset)}/runs/{run_id}/artifacts/{REPORT}?workflowType=machine_learning"

    def _experiment_url(self, dataset: str) -> str:
        """CALIPERT_MLFLOW_URL says how browsers reach the server where that differs from how workers do."""
        pages = (read_settings().mlflow_url or self.tracking_uri).rstrip("/")
        return f"{pages}/#/experiments/{self._find_experiment(dataset)}"

    def _find_experiment(self, dataset: str) -> str:
        """Return the id of a data set's experiment, which is created if it is missing.

        Raises UserError for one that was deleted.
        """
        name = f"{EXPERIMENT_PREFIX}{dataset}"
        found = self.ask(lambda client: client.get_experiment_by_name(name))
        if found is None:
            try:
                return self.ask(lambda client: client.create_experiment(name))
            except Refused as error:
                if error.code != "RESOURCE_ALREADY_EXISTS":
                    raise
            # Another process was faster.
            return self._find_experiment(dataset)
        number = str(found.experiment_id)
        if found.lifecycle_stage != "active":
            raise UserError(
                f"MLflow experiment {name}",
                "lifecycle_stage",
                found.lifecycle_stage,
                f"restore it (`mlflow experiments restore --experiment-id {number}`) or remove it for good "
                f"(`mlflow gc --experiment-ids {number}`)",
            )
        return number


def read_git_commit(root: Path) -> str | None:
    """Return the commit checked out at `root`; None if that is not the top of a git checkout, or git is absent."""
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (FileNotFoundError, subprocess.SubprocessError):
        return None
    top, commit, _ = answer.split("\n")
    return commit if Path(top) == root.resolve() else None


def _describe_process(flow_run_id: str | None) -> dict[str, str | None]:
    """Return tags that say by what a run was opened."""
    # An image has no checkout: it is told when it is built.
    commit = read_settings().commit or read_git_commit(Path(__file__).resolve().parents[2])
    return {"git_commit": commit, _FLOW_RUN: flow_run_id, _PROCESS: name_this_process()}


def _describe_run(model: ModelRun, shared: Mapping[str, str | None], params: Mapping[str, object]) -> WantedRun:
    name = model.model if model.seed < 0 else f"{model.model} seed {model.seed}"
    own = {"kind": model.kind, "model": model.model, "seed": str(model.seed), "engine": model.engine}
    return WantedRun(model.key, name, {**shared, **own}, {each: format_param(value) for each, value in params.items()})


def _describe_fold(model: WantedRun, parent: str, fold: int) -> WantedRun:
    inherited = {name: model.tags.get(name) for name in _INHERITED}
    params = {name: model.params[name] for name in ("model", "dataset", "seed")}
    return WantedRun(
        f"{model.key}/fold_{fold}",
        f"{model.name} fold {fold}",
        {**inherited, PARENT: parent, "fold": str(fold)},
        {**params, "fold": str(fold)},
        once=True,
    )


def _log_params(server: Server, run: Run, params: Mapping[str, object]) -> None:
    """Keep all params whole in params.json if MLflow's limits change one of them."""
    whole = {name: format_param(value) for name, value in params.items()}
    if all(fit_name(name) == name and fit_param(text) == text for name, text in whole.items()):
        return
    text = json.dumps(whole, indent=2)
    server.ask(lambda client: client.log_text(run.info.run_id, text, "params.json"))


def _log_dataset(server: Server, run: Run, name: str, digest: str, source: str) -> None:
    """Write the data set as the run's input; MLflow keeps 36 characters of the digest."""
    if run.inputs and run.inputs.dataset_inputs:
        return
    entities = load_mlflow().entities
    kind = {"https": "http", "s3": "s3"}.get(source.partition("://")[0], "local")
    place = json.dumps({"url" if kind == "http" else "uri": source})
    dataset = entities.Dataset(name, digest[:36], kind, place)
    given = entities.DatasetInput(dataset, [entities.InputTag("mlflow.data.context", "benchmark")])

    def log() -> None:
        server.ask(lambda client: client.log_inputs(run.info.run_id, [given]))

    try:
        log()
    except Refused as error:
        if "IntegrityError" not in error.found:
            raise
        # Another process made the same data set at the same moment: now it exists.
        log()
