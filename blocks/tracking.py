"""What is kept in MLflow: an experiment per data set, a run per model and seed, a child run per fold.

Everything here can be repeated. A run is found again by its tag `calipert.key`, a value that already stands there is
not written twice, and a run that was cut off is ended by the next attempt. docs/tracking.md lists every name.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import httpx
import pandas as pd
from prefect.blocks.core import Block
from pydantic import Field, field_validator

from core.calibration import VARIANTS
from core.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT_PREFIX = "calipert/"

# Columns of the leaderboard that become the metrics `<metric>.<column>` of a model's run.
SUMMARY_COLUMNS = (
    "mean",
    "median",
    "n_conditions",
    "coverage",
    "nan_share",
    "headroom",
    "headroom_low",
    "headroom_high",
    "headroom_half_sd",
    "rank",
)
# Columns of the calibration table that become metrics `<metric>.<variant><ending>` for every variant of the DRF.
DRF_ENDINGS = {"drf": "", "drf_low": "_low", "drf_high": "_high", "drf_half_sd": "_half_sd"}
# Columns that are kept for the variant that carries the verdict only, as `<metric>.<column>`.
QUOTED_VARIANT = VARIANTS[0].name
QUOTED_COLUMNS = ("bds", "bds_low", "bds_high", "bds_half_sd", "nan_share", "n_conditions")

# Set before mlflow is imported, because its telemetry starts with the import. The request settings leave room for a
# busy server and still let a dead one be noticed within seconds; who has set them otherwise keeps his own.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_PROBE_SECONDS = 4.0
_PROBE_PAUSES = (0.0, 1.0, 2.0)
_LIVE_SECONDS = 2.0
# Servers before MLflow 2.8 refuse longer values, and nobody reads them in a table; the whole text goes to params.json.
_LONGEST_PARAM = 500
_LONGEST_TAG = 5000
_LONGEST_NAME = 250

_KEY = "calipert.key"
_PARENT = "mlflow.parentRunId"
_FAILURE = "failure"
_FLOW_RUN = "flow_run_id"
# What a fold's run repeats of its model's, so that one filter finds both.
_INHERITED = (
    "benchmark_id",
    "kind",
    "model",
    "dataset",
    "seed",
    "engine",
    "git_commit",
    _FLOW_RUN,
)

_log = logging.getLogger("calipert.tracking")

Points = dict[tuple[str, int], float]


class MLflowTracking(Block):
    """Writes benchmarks and calibrations to an MLflow server.

    Every method talks to the server at `tracking_uri` and to nothing else, and raises UserError, naming that URL and
    the remedy, when the server does not answer (within about 15 seconds) or refuses. Credentials are never part of
    the URL: MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD from the environment.
    """

    _block_type_name = "MLflow tracking"
    _block_type_slug = "mlflow-tracking"
    _description = "The MLflow server that keeps the runs of calipert."

    tracking_uri: str = Field(description="URL of the MLflow server, for instance http://127.0.0.1:5000")

    @field_validator("tracking_uri")
    @classmethod
    def _server_url(cls, uri: str) -> str:
        parts = urlsplit(uri)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                "environment",
                "MLFLOW_TRACKING_URI",
                uri,
                "Give the http or https URL of an MLflow server: databases and folders written to directly by "
                "several processes get damaged.",
            )
        if parts.username or parts.password:
            raise UserError(
                "environment",
                "MLFLOW_TRACKING_URI",
                f"a user name or password for {parts.hostname}",
                "Take it out of the URL and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead.",
            )
        return uri.rstrip("/")

    def open_model_run(
        self,
        dataset: str,
        model: str,
        seed: int,
        *,
        key: str,
        kind: str,
        benchmark_id: str,
        digest: str,
        source: str,
        params: Mapping[str, object],
        engine: str | None = None,
        flow_run_id: str | None = None,
    ) -> str:
        """The id of the run of one model and seed, RUNNING; created unless `key` is already in the experiment.

        key:     hash of what the run's results follow from (model, seed, data set, code, and the benchmark, whose
                 panel its summaries depend on); the same key must come with the same params.
        kind:    "model", "baseline", "negative control" or "positive control".
        seed:    the training seed; -1 for controls, which have none.
        digest:  identifies what the run is scored against; source: where the raw file comes from, an https URL or any
                 other name. Both become the data set input.
        params:  hyperparameters and whatever else decides the result. Values longer than 500 characters are cut
                 with their hash, and params.json has all of them whole.
        engine:  identity of what trains (image digest, or hash of the build folder); None where nothing trains.

        Call it before any fan-out: two simultaneous callers may each create a run (the next call would heal that).
        """
        name = model if seed < 0 else f"{model} seed {seed}"
        tags = {
            "kind": kind,
            "benchmark_id": benchmark_id,
            "model": model,
            "seed": str(seed),
            "dataset": dataset,
            "engine": engine,
            _FLOW_RUN: flow_run_id,
        }
        with self._client() as client:
            run_id = _open(client, _experiment(client, dataset), key, name, _with_commit(tags))
            _write_params(client, run_id, {"model": model, "dataset": dataset, "seed": seed, **params})
            _write_dataset(client, run_id, dataset, digest, source)
        return run_id

    def open_fold_runs(self, model_run_id: str, folds: Iterable[int]) -> dict[int, str]:
        """The ids of the runs of a model's folds, RUNNING, as children of the model's run.

        Call it before the folds are handed out to tasks; a fold's task gets its id.
        """
        opened = {}
        with self._client() as client:
            from mlflow.entities import Param

            parent = client.get_run(model_run_id)
            inherited = {name: parent.data.tags.get(name) for name in _INHERITED}
            existing = _by_key(client, parent.info.experiment_id, f"tags.`{_PARENT}` = '{model_run_id}'")
            for fold in folds:
                key = f"{parent.data.tags[_KEY]}/fold_{fold}"
                name = f"{parent.info.run_name} fold {fold}"
                tags = {**inherited, _PARENT: model_run_id, "fold": str(fold)}
                run_id = _open(client, parent.info.experiment_id, key, name, tags, existing.get(key, []))
                params = [Param(p, parent.data.params[p]) for p in ("model", "dataset", "seed")]
                client.log_batch(run_id, params=[*params, Param("fold", str(fold))])
                opened[fold] = run_id
        return opened

    def live_curve(self, run_id: str) -> Callable[[Mapping[str, object]], None]:
        """A function that takes the events of a training while it runs and writes its metrics, some at a time.

        Events other than {"event": "metric", "name", "step", "value"} are ignored. When the server is lost, training
        goes on and the curve stays incomplete until `log_curve`, which also writes the last seconds: a warning says
        so once.
        """
        with self._client() as client:
            client.get_run(run_id)
        waiting: Points = {}
        sent_at = time.monotonic()
        lost = False

        def take(event: Mapping[str, object]) -> None:
            nonlocal sent_at, lost
            if lost or event.get("event") != "metric":
                return
            name, step, value = _point(event, "training event")
            waiting[name, step] = value
            if time.monotonic() - sent_at < _LIVE_SECONDS:
                return
            try:
                with self._client() as client:
                    _write_metrics(client, client.get_run(run_id), waiting)
            except UserError as error:
                lost = True
                _log.warning("Training goes on without its curve in MLflow until it ends: %s", error)
            waiting.clear()
            sent_at = time.monotonic()

        return take

    def log_curve(self, run_id: str, training: Path) -> None:
        """Make a fold's run show exactly the curve of its training.jsonl (JSON lines; those that are no metric are
        skipped). Points that were already written live are not repeated; of two values at one step the last counts.

        NaN and infinite values are left out, and counted per metric in the tag `not_finite`.
        """
        points: Points = {}
        lines = training.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            event = json.loads(line) if line.strip() else {}
            if event.get("event") == "metric":
                name, step, value = _point(event, f"{training}, line {number}")
                points[name, step] = value
        with self._client() as client:
            _write_metrics(client, client.get_run(run_id), points)
            bad = Counter(name for (name, _), value in points.items() if not math.isfinite(value))
            told = ", ".join(f"{name} ({count})" for name, count in sorted(bad.items()))
            _write_tags(client, run_id, {"not_finite": told or "none"})

    def log_leaderboard(self, leaderboard: pd.DataFrame, run_ids: Mapping[str, str]) -> None:
        """Write each model's rows of the leaderboard as metrics `<metric>.<column>` of its run (columns:
        SUMMARY_COLUMNS, in the metrics' own units, shares in [0, 1]).

        run_ids: the run of each model to be written; a model without rows raises KeyError.
        NaN and infinite values are left out and named in the tag `not_finite` (a rank that a metric without a
        calibrated verdict cannot have is not named). Tags: `calibrated` lists the calibrated metrics,
        `calibrated.<metric>` and `in_panel` are "true" or "false".
        """
        by_model = dict(iter(leaderboard.groupby("model", sort=False)))
        with self._client() as client:
            for model, run_id in run_ids.items():
                rows = by_model[model].set_index("metric")
                points = {
                    (f"{metric}.{column}", 0): float(value)
                    for column in SUMMARY_COLUMNS
                    for metric, value in rows[column].items()
                }
                _write_metrics(client, client.get_run(run_id), points)
                not_finite = [n for n in _not_finite(points) if not n.endswith(".rank")]
                calibrated = rows["calibrated"].astype(bool)
                tags = {
                    "calibrated": ", ".join(sorted(calibrated.index[calibrated])) or "none",
                    **{f"calibrated.{metric}": str(yes).lower() for metric, yes in calibrated.items()},
                    "in_panel": str(bool(rows["in_panel"].all())).lower(),
                    "not_finite": ", ".join(not_finite) or "none",
                }
                _write_tags(client, run_id, tags)

    def log_calibration(
        self,
        dataset: str,
        calibration: pd.DataFrame,
        *,
        key: str,
        digest: str,
        source: str,
        params: Mapping[str, object],
        files: Iterable[Path] = (),
        flow_run_id: str | None = None,
    ) -> str:
        """Write one calibration as a run of its own, FINISHED, and return its id; repeated, it is the same run.

        calibration: the table of calibration.parquet. Metrics: `<metric>.<variant>` is the DRF, with `_low`, `_high`
        and `_half_sd`; `<metric>.bds` and the others of QUOTED_COLUMNS belong to QUOTED_VARIANT. Tags:
        `verdict.<metric>` and `calibrated`. NaN and infinite values are left out, named in the tag `not_finite`.
        digest: key of the calibration. key, source, params: as in `open_model_run`. files: files and folders to keep
        with the run.
        When something fails, the run ends as FAILED with the reason, and the error goes on.
        """
        with self._client() as client:
            about = {"kind": "calibration", "dataset": dataset, _FLOW_RUN: flow_run_id}
            run_id = _open(client, _experiment(client, dataset), key, "calibration", _with_commit(about))
        try:
            with self._client() as client:
                _write_params(client, run_id, {"dataset": dataset, **params})
                _write_dataset(client, run_id, dataset, digest, source)
                points = _calibration_points(calibration)
                _write_metrics(client, client.get_run(run_id), points)
                quoted = calibration[calibration["variant"] == QUOTED_VARIANT]
                verdicts = quoted.set_index("metric")["verdict"]
                calibrated = verdicts.index[verdicts == "calibrated"]
                tags = {
                    "calibrated": ", ".join(sorted(calibrated)) or "none",
                    **{f"verdict.{metric}": str(verdict) for metric, verdict in verdicts.items()},
                    "not_finite": ", ".join(_not_finite(points)) or "none",
                }
                _write_tags(client, run_id, tags)
                _write_files(client, run_id, files, None)
        except UserError:
            # The server is lost or refuses: there is nobody to tell, and the next attempt finds the run.
            raise
        except BaseException as error:
            self.fail(run_id, f"{type(error).__name__}: {error}")
            raise
        self.finish(run_id)
        return run_id

    def log_files(self, run_id: str, files: Iterable[Path], folder: str | None = None) -> None:
        """Keep files (and whole folders, under their own name) with a run; a file of the same name is replaced."""
        with self._client() as client:
            _write_files(client, run_id, files, folder)

    def finish(self, run_id: str) -> None:
        """End a run, and those of its folds that are still running, as FINISHED.

        A run that had finished before keeps its first end, so that a repetition from finished artifacts does not
        stretch its duration.
        """
        with self._client() as client:
            for run in _with_running_children(client, run_id):
                _end(client, run, "FINISHED")

    def fail(self, run_id: str, reason: str) -> None:
        """End a run, and those of its folds that are still running, as FAILED, with the reason in the tag `failure`.

        The tag stays until the run finishes.
        """
        with self._client() as client:
            for run in _with_running_children(client, run_id):
                _end(client, run, "FAILED", reason)

    def end_interrupted(self, flow_run_id: str, reason: str) -> list[str]:
        """End as KILLED every run that this flow run left running, and return their ids: for what is done when a flow
        run was cancelled or has crashed."""
        with self._client() as client:
            left = [run for run in _running(client) if run.data.tags.get(_FLOW_RUN) == flow_run_id]
            for run in left:
                _end(client, run, "KILLED", reason)
        return sorted(run.info.run_id for run in left)

    def benchmark_url(self, dataset: str, benchmark_id: str) -> str:
        """The page that compares the models of one benchmark in charts, in the UI's mode for model training."""
        with self._client() as client:
            experiment = _experiment(client, dataset)
        chosen = quote(f"tags.benchmark_id = '{benchmark_id}'")
        return (
            f"{self.tracking_uri}/#/experiments/{experiment}/runs"
            f"?workflowType=machine_learning&compareRunsMode=CHART&searchFilter={chosen}"
        )

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        """A client of a server that answers; errors of the connection leave as UserError."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        _wait_for(self.tracking_uri)
        try:
            yield MlflowClient(tracking_uri=self.tracking_uri)
        except MlflowException as error:
            explained = _explained(error, self.tracking_uri)
            if explained is None:
                raise
            raise explained from error


def git_commit(root: Path) -> str | None:
    """The commit that is checked out at `root`; None where it is not the top of a git checkout, or git is absent."""
    try:
        told = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    lines = told.stdout.split("\n")
    if told.returncode != 0 or Path(lines[0]) != root.resolve():
        return None
    return lines[1]


def _with_commit(tags: Mapping[str, str | None]) -> dict[str, str | None]:
    return {**tags, "git_commit": git_commit(Path(__file__).resolve().parents[1])}


def _wait_for(uri: str) -> None:
    """Return once the server answers anything at all; raise UserError when it does not within about 15 seconds."""
    problem = ""
    for pause in _PROBE_PAUSES:
        time.sleep(pause)
        try:
            # Whose certificate it is matters to MLflow's client, which sends the data, not to this question.
            httpx.get(f"{uri}/health", timeout=_PROBE_SECONDS, verify=False)  # noqa: S501
        except httpx.TransportError as error:
            problem = f"{type(error).__name__}: {error}".rstrip(": ")
        else:
            return
    raise _no_answer(uri, problem)


def _no_answer(uri: str, problem: str) -> UserError:
    return UserError(
        uri,
        "MLflow server",
        f"no answer ({problem})",
        "Start the MLflow server (`make up` does), or correct MLFLOW_TRACKING_URI; then run this again: finished "
        "artifacts are not recomputed.",
    )


def _explained(error: Exception, uri: str) -> UserError | None:
    """The UserError for a lost connection or a refusal; None for any other error of MLflow, which tells them apart by
    its messages only."""
    text = str(error)
    if re.search(r"failed with error code (401|403)|PERMISSION_DENIED|UNAUTHENTICATED", text):
        return UserError(
            uri,
            "access to the MLflow server",
            text,
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD if the server asks for them; where it is "
            "reached by another name than localhost, start it with --allowed-hosts naming it.",
        )
    if re.match(r"API request to .* failed with (timeout )?exception", text):
        return _no_answer(uri, text)
    if re.match(r"API request to .* failed with error code", text):
        return UserError(uri, "MLflow server", text, "Check that this is the URL of an MLflow server, and its log.")
    return None


def _experiment(client: MlflowClient, dataset: str) -> str:
    """The id of the data set's experiment, created if absent."""
    from mlflow.exceptions import MlflowException

    name = f"{EXPERIMENT_PREFIX}{dataset}"
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Somebody else was faster.
        return _experiment(client, dataset)
    if found.lifecycle_stage != "active":
        raise UserError(
            f"MLflow experiment {name}",
            "lifecycle_stage",
            found.lifecycle_stage,
            f"Restore it (`mlflow experiments restore --experiment-id {found.experiment_id}`) or remove it for good "
            f"(`mlflow gc --experiment-ids {found.experiment_id}`).",
        )
    return str(found.experiment_id)


def _search(client: MlflowClient, experiments: list[str], chosen: str) -> list[Run]:
    """All active runs for a filter, page by page."""
    runs: list[Run] = []
    token = None
    while experiments:
        page = client.search_runs(experiments, chosen, page_token=token)
        runs.extend(page)
        token = page.token
        if not token:
            break
    return runs


def _by_key(client: MlflowClient, experiment: str, chosen: str) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in _search(client, [experiment], chosen):
        found.setdefault(run.data.tags.get(_KEY, ""), []).append(run)
    return found


def _open(
    client: MlflowClient,
    experiment: str,
    key: str,
    name: str,
    tags: Mapping[str, str | None],
    found: list[Run] | None = None,
) -> str:
    """The id of the run with this key, RUNNING, with these tags; created if there is none.

    Of several (a request repeated after a lost answer creates two) the finished one, else the oldest, is kept.
    """
    wanted = f"tags.`{_KEY}` = '{key}'"
    told = {tag: value for tag, value in tags.items() if value is not None}
    runs = _by_key(client, experiment, wanted).get(key, []) if found is None else found
    if not runs:
        client.create_run(experiment, run_name=name, tags={_KEY: key, **told})
        runs = _search(client, [experiment], wanted)
        if len(runs) == 1:
            return str(runs[0].info.run_id)
    runs.sort(key=lambda run: (run.info.status != "FINISHED", run.info.start_time, run.info.run_id))
    kept, *others = runs
    for other in others:
        client.delete_run(other.info.run_id)
    if kept.info.status != "RUNNING":
        client.update_run(kept.info.run_id, status="RUNNING")
    _write_tags(client, kept.info.run_id, told)
    return str(kept.info.run_id)


def _end(client: MlflowClient, run: Run, status: str, reason: str | None = None) -> None:
    run_id = run.info.run_id
    first_end = None
    if reason is not None:
        _write_tags(client, run_id, {_FAILURE: reason})
    elif _FAILURE in run.data.tags:
        client.delete_tag(run_id, _FAILURE)
    else:
        # Only a run that finished has an end and no failure.
        first_end = run.info.end_time
    client.set_terminated(run_id, status, first_end)


def _with_running_children(client: MlflowClient, run_id: str) -> list[Run]:
    """The run's children that are still running, then the run itself."""
    run = client.get_run(run_id)
    children = f"tags.`{_PARENT}` = '{run_id}' and attributes.status = 'RUNNING'"
    return [*_search(client, [run.info.experiment_id], children), run]


def _running(client: MlflowClient) -> list[Run]:
    """Every RUNNING run of every experiment of this project."""
    experiments: list[str] = []
    token = None
    while True:
        page = client.search_experiments(filter_string=f"name LIKE '{EXPERIMENT_PREFIX}%'", page_token=token)
        experiments.extend(e.experiment_id for e in page)
        token = page.token
        if not token:
            return _search(client, experiments, "attributes.status = 'RUNNING'")


def _point(event: Mapping[str, object], where: str) -> tuple[str, int, float]:
    """Name, step and value of a metric event; value may be NaN or infinite."""
    try:
        return _allowed(str(event["name"])), int(str(event["step"])), float(str(event["value"]))
    except (KeyError, ValueError) as error:
        raise UserError(
            where,
            "metric event",
            json.dumps(dict(event), default=str),
            f"Write name, step (a whole number) and value (a number): {error!r}.",
        ) from error


def _allowed(name: str) -> str:
    """A name that MLflow takes: letters, digits and `_-. :/`, at most 250 of them; a changed one ends in its hash."""
    allowed = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
    if allowed == name and len(name) <= _LONGEST_NAME:
        return name
    return f"{allowed[: _LONGEST_NAME - 9]}-{sha256(name.encode()).hexdigest()[:8]}"


def _not_finite(points: Points) -> list[str]:
    return sorted({name for (name, _), value in points.items() if not math.isfinite(value)})


def _calibration_points(calibration: pd.DataFrame) -> Points:
    points = {}
    for row in calibration.to_dict("records"):
        for column, ending in DRF_ENDINGS.items():
            points[f"{row['metric']}.{row['variant']}{ending}", 0] = float(row[column])
        if row["variant"] == QUOTED_VARIANT:
            for column in QUOTED_COLUMNS:
                points[f"{row['metric']}.{column}", 0] = float(row[column])
    return points


def _write_metrics(client: MlflowClient, run: Run, points: Points) -> None:
    """Make the run show these values, (name, step) -> value.

    All carry the run's start as their time, so that a repetition adds nothing. MLflow cannot take a value back, but of
    several at one step it shows the one with the latest time (and then the greatest): a value that differs from what
    stands there gets the next millisecond. One that is not finite is written only as NaN over a finite one.
    """
    from mlflow.entities import Metric

    shown = run.data.metrics
    there = {(name, step): value for (name, step), value in points.items() if name in shown}
    unsure = {name for (name, step), value in there.items() if step != 0 or shown[name] != value}
    standing: dict[tuple[str, int], tuple[int, float]] = {}
    for name in sorted(unsure):
        for metric in client.get_metric_history(run.info.run_id, name):
            place = name, metric.step
            standing[place] = max(standing.get(place, (0, -math.inf)), (metric.timestamp, metric.value))
    changed = []
    for (name, step), value in points.items():
        if name in shown and name not in unsure:
            continue
        stamp, before = standing.get((name, step), (run.info.start_time - 1, math.nan))
        value = value if math.isfinite(value) else math.nan
        if value != before and not (math.isnan(value) and math.isnan(before)):
            changed.append(Metric(name, value, stamp + 1, step))
    client.log_batch(run.info.run_id, metrics=changed)


def _write_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    written = {_allowed(name): value[:_LONGEST_TAG] for name, value in tags.items()}
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in written.items()])


def _write_params(client: MlflowClient, run_id: str, params: Mapping[str, object]) -> None:
    """Write params; where MLflow's limits change one, all of them whole go to params.json as well."""
    from mlflow.entities import Param

    whole = {name: _as_text(value) for name, value in params.items()}
    written = {_allowed(name): _shortened(text) for name, text in whole.items()}
    client.log_batch(run_id, params=[Param(name, text) for name, text in written.items()])
    if written != whole:
        client.log_dict(run_id, whole, "params.json")


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST_PARAM:
        return text
    ending = f"... sha256 {sha256(text.encode()).hexdigest()[:16]}, see params.json"
    return text[: _LONGEST_PARAM - len(ending)] + ending


def _write_dataset(client: MlflowClient, run_id: str, name: str, digest: str, source: str) -> None:
    """The data set as the run's input; MLflow keeps 36 characters of the digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind = {"https": "http", "s3": "s3"}.get(source.partition("://")[0], "local")
    place = json.dumps({"url" if kind == "http" else "uri": source})
    data = Dataset(name, digest[:36], kind, place)
    client.log_inputs(run_id, datasets=[DatasetInput(data, [InputTag("mlflow.data.context", "benchmark")])])


def _write_files(client: MlflowClient, run_id: str, files: Iterable[Path], folder: str | None) -> None:
    for file in files:
        if file.is_dir():
            inner = file.name if folder is None else f"{folder}/{file.name}"
            client.log_artifacts(run_id, str(file), inner)
        else:
            client.log_artifact(run_id, str(file), folder)
