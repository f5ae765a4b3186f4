"""MLflow runs that can be opened, written and ended again: nothing is written twice.

A run is found by its tag `calipert.key`. The points of its metrics carry the run's start as their time, so that a
repetition adds nothing.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from blocks.tracking.client import Refused, Server, load_mlflow

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

# Four at once take half the time of one; eight gain nothing more from a server of one process.
THREADS = 4
# Servers before MLflow 2.8 refuse longer values.
LONGEST_PARAM = 500
LONGEST_TAG = 5000
LONGEST_NAME = 250

KEY = "calipert.key"
PARENT = "mlflow.parentRunId"
FAILURE = "failure"

# (name, step) -> value, which may be NaN or infinite.
Points = dict[tuple[str, int], float]
# (name, step) -> the point that the run shows there.
Shown = dict[tuple[str, int], "Metric"]

T = TypeVar("T")
R = TypeVar("R")


class WantedRun(NamedTuple):
    """A run that must exist and be RUNNING. Tags without a value are left out. once: it stays FINISHED if it was."""

    key: str
    name: str
    tags: Mapping[str, str | None]
    params: Mapping[str, str]
    once: bool = False


def map_threads(work: Callable[[T], R], many: Iterable[T]) -> list[R]:
    """Return the results of some work on each, in their order, a few at a time. Raises the first error."""
    # Each in a context of its own, a copy of the caller's, which names the flow run whose log gets the warnings.
    things = [(copy_context(), each) for each in many]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda thing: thing[0].run(work, thing[1]), things))


def open_or_create_runs(
    server: Server, experiment: str, chosen: str, wanted: list[WantedRun], found: list[Run]
) -> dict[str, Run]:
    """Return key -> the run with that key as it was before; now it has the wanted tags and params.

    found: what the filter `chosen` has found in the experiment; runs that are missing are created. Of several with one
    key (a request repeated after a lost answer creates two) the finished one, else the oldest, is kept. Raises
    Refused where a run has another value of a param.
    """
    by_key = _group_by_key(found)
    missing = [each for each in wanted if each.key not in by_key]
    if missing:

        def create(new: WantedRun) -> None:
            tags = {KEY: new.key, **_drop_missing(new.tags)}
            server.ask(lambda client: client.create_run(experiment, tags=tags, run_name=new.name))

        map_threads(create, missing)
        by_key = _group_by_key(server.find_runs([experiment], chosen))
    runs = map_threads(lambda each: _open_run(server, by_key[each.key], each), wanted)
    return {each.key: run for each, run in zip(wanted, runs, strict=True)}


def _group_by_key(found: Iterable[Run]) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {}
    for run in found:
        runs.setdefault(run.data.tags.get(KEY, ""), []).append(run)
    return runs


def _open_run(server: Server, found: list[Run], wanted: WantedRun) -> Run:
    kept, *others = sorted(found, key=lambda run: (run.info.status != "FINISHED", run.info.start_time, run.info.run_id))
    map_threads(lambda other: server.ask(lambda client: client.delete_run(other.info.run_id)), others)
    run_id, status = kept.info.run_id, kept.info.status
    tags = _fit_tags(_drop_missing(wanted.tags))
    params = {fit_name(name): fit_param(text) for name, text in wanted.params.items()}
    # The tags first: until the run is RUNNING, no other flow run takes it for one that was left behind.
    server.log(run_id, params=_find_changes(params, kept.data.params), tags=_find_changes(tags, kept.data.tags))
    if status != "RUNNING" and not (wanted.once and status == "FINISHED"):
        server.ask(lambda client: client.update_run(run_id, "RUNNING"))
    return kept


def end_run(server: Server, run: Run, status: str, reason: str | None = None) -> None:
    """End a run. reason: why, if it did not finish; kept in the tag `failure` until the run finishes.

    A run that had finished before keeps its first end.
    """
    run_id, failed = run.info.run_id, FAILURE in run.data.tags
    if status == run.info.status == "FINISHED" and not failed:
        return
    # Only a run that finished has an end and no failure.
    first_end = run.info.end_time if reason is None and not failed else None
    if reason is not None:
        server.log(run_id, tags=_find_changes(_fit_tags({FAILURE: reason}), run.data.tags))
    elif failed:
        try:
            server.ask(lambda client: client.delete_tag(run_id, FAILURE))
        except Refused as error:
            # The answer to the first of two tries may have been lost.
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
    server.ask(lambda client: client.set_terminated(run_id, status, first_end or int(time.time() * 1000)))


def find_with_running_children(server: Server, run_ids: Sequence[str]) -> list[Run]:
    """Return some runs of one experiment, each after those of its children that are still running."""
    if not run_ids:
        return []
    first = server.get_run(run_ids[0])
    # One search finds all that is running, the runs themselves too as a rule; a fold has no children.
    alone = len(run_ids) == 1 and PARENT in first.data.tags
    running = [] if alone else server.find_runs([first.info.experiment_id], "attributes.status = 'RUNNING'")
    known = {run.info.run_id: run for run in (*running, first)}
    runs = map_threads(lambda run_id: known.get(run_id) or server.get_run(run_id), run_ids)
    return [*(run for run in running if run.data.tags.get(PARENT) in run_ids), *runs]


def write_values(server: Server, run: Run, values: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Make the run show these values, one of each metric, at step 0, and these tags.

    MLflow keeps no NaN or infinite value; one that replaces a finite value is shown as NaN.
    """
    shown = run.data.metrics
    changed = {name: value for name, value in values.items() if not _is_same(value, shown.get(name, math.nan))}
    write_points(server, run, {(name, 0): value for name, value in changed.items()}, tags)


def write_points(server: Server, run: Run, points: Points, tags: Mapping[str, str], shown: Shown | None = None) -> None:
    """Make the run show these points and tags; what it shows already is not sent.

    shown: what the run is known to show, kept up to date; asked of the server if it is None.
    """
    if shown is None:
        shown = read_points(server, run, {name for name, _ in points})
    metrics = list_changes(run, points, shown)
    server.log(run.info.run_id, metrics, tags=_find_changes(_fit_tags(tags), run.data.tags))
    shown.update({(metric.key, metric.step): metric for metric in metrics})


def read_points(server: Server, run: Run, names: Iterable[str]) -> Shown:
    """Return all points that the run shows of these metrics: of several at one step the last, then the greatest."""
    known = sorted(set(names) & run.data.metrics.keys())
    histories = map_threads(
        lambda name: server.ask(lambda client: client.get_metric_history(run.info.run_id, name)), known
    )
    points = [point for history in histories for point in history]
    points.sort(key=lambda point: (point.timestamp, -math.inf if math.isnan(point.value) else point.value))
    return {(point.key, point.step): point for point in points}


def list_changes(run: Run, points: Points, shown: Shown) -> list[Metric]:
    """Return what has to be written so that the run shows these points.

    MLflow cannot take a value back, but of several at one step it shows the one with the latest time (and then the
    greatest): a value that differs from the shown one gets the next millisecond. One that is not finite is written
    only as NaN, in the place of a finite one.
    """
    metric = load_mlflow().entities.Metric
    changes = []
    for (name, step), value in points.items():
        before = shown.get((name, step))
        if not _is_same(value, before.value if before else math.nan):
            time_of_it = before.timestamp + 1 if before else run.info.start_time
            changes.append(metric(name, value if math.isfinite(value) else math.nan, time_of_it, step))
    return changes


def _is_same(one: float, other: float) -> bool:
    return one == other or not (math.isfinite(one) or math.isfinite(other))


def fit_name(name: str) -> str:
    """Return a name that MLflow takes: at most 250 letters, digits and `_-. :/`; a changed one ends in its hash."""
    fitted = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
    if fitted == name and len(name) <= LONGEST_NAME:
        return name
    return f"{fitted[: LONGEST_NAME - 9]}-{sha256(name.encode()).hexdigest()[:8]}"


def fit_param(text: str) -> str:
    """Return a value that MLflow takes; a cut one ends in the hash of the whole."""
    if len(text) <= LONGEST_PARAM:
        return text
    ending = f"... sha256 {sha256(text.encode()).hexdigest()[:16]}, see params.json"
    return text[: LONGEST_PARAM - len(ending)] + ending


def format_param(value: object) -> str:
    """Return the text of a param's value."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _fit_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {fit_name(name): value[:LONGEST_TAG] for name, value in tags.items()}


def _drop_missing(tags: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in tags.items() if value is not None}


def _find_changes(wanted: Mapping[str, str], shown: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in wanted.items() if shown.get(name) != value}
