"""MLflow runs that can be opened, written and ended again: whatever stands there already is not written twice.

A run is found by its tag `calipert.key`. Of its metrics all points carry the run's start as their time, so that a
repetition adds nothing.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import NamedTuple, TypeVar

from blocks.tracking.api import Metric, Point, Run, Server

# Four at once take half the time of one; eight gain nothing more from a server of one process.
THREADS = 4
# Servers before MLflow 2.8 refuse longer values, and nobody reads them in a table.
LONGEST_PARAM = 500
LONGEST_TAG = 5000
LONGEST_NAME = 250

KEY = "calipert.key"
PARENT = "mlflow.parentRunId"
FAILURE = "failure"

# (name, step) -> value, which may be NaN or infinite.
Points = dict[tuple[str, int], float]
# (name, step) -> what stands there.
Standing = dict[tuple[str, int], Point]

T = TypeVar("T")
R = TypeVar("R")


class Wanted(NamedTuple):
    """A run that shall be there, and RUNNING. Tags without a value are left out. once: it stays FINISHED if it was."""

    key: str
    name: str
    tags: Mapping[str, str | None]
    params: Mapping[str, str]
    once: bool = False


def at_once(work: Callable[[T], R], many: Iterable[T]) -> list[R]:
    """The results of some work on each, in their order, a few at a time. Raises the first error."""
    things = list(many)
    if len(things) < 2:
        return [work(thing) for thing in things]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, things))


def opened(server: Server, experiment: str, chosen: str, wanted: list[Wanted], found: list[Run]) -> dict[str, Run]:
    """Key -> the run with that key, as it was before it was opened, and has these tags and params now.

    found: what the filter `chosen` has found in the experiment; runs that are missing are created. Of several with one
    key (a request repeated after a lost answer creates two) the finished one, else the oldest, is kept. Raises
    Refused where a run has another value of a param.
    """
    there = _by_key(found)
    missing = [each for each in wanted if each.key not in there]
    if missing:
        at_once(lambda new: server.create_run(experiment, new.name, {KEY: new.key, **_given(new.tags)}), missing)
        there = _by_key(server.search([experiment], chosen))
    runs = at_once(lambda each: _open(server, there[each.key], each), wanted)
    return {each.key: run for each, run in zip(wanted, runs, strict=True)}


def _by_key(found: Iterable[Run]) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {}
    for run in found:
        runs.setdefault(run.tags.get(KEY, ""), []).append(run)
    return runs


def _open(server: Server, found: list[Run], wanted: Wanted) -> Run:
    kept, *others = sorted(found, key=lambda run: (run.status != "FINISHED", run.start_time, run.run_id))
    for other in others:
        server.delete_run(other.run_id)
    tags = _written(_given(wanted.tags))
    params = {allowed(name): shortened(text) for name, text in wanted.params.items()}
    # The tags first: until the run is RUNNING, no other flow run takes it for one that was left behind.
    server.log(kept.run_id, params=_changed(params, kept.params), tags=_changed(tags, kept.tags))
    if kept.status != "RUNNING" and not (wanted.once and kept.status == "FINISHED"):
        server.set_status(kept.run_id, "RUNNING")
    return kept


def end(server: Server, run: Run, status: str, reason: str | None = None) -> None:
    """End a run. reason: why, where it did not finish; kept in the tag `failure` until the run finishes.

    A run that had finished before keeps its first end.
    """
    if status == run.status == "FINISHED" and FAILURE not in run.tags:
        return
    first_end = None
    if reason is not None:
        write(server, run, tags={FAILURE: reason})
    elif FAILURE in run.tags:
        server.delete_tag(run.run_id, FAILURE)
    else:
        # Only a run that finished has an end and no failure.
        first_end = run.end_time
    server.set_status(run.run_id, status, first_end or int(time.time() * 1000))


def with_running_children(server: Server, run_ids: Sequence[str]) -> list[Run]:
    """Some runs of one experiment, each after those of its children that are still running."""
    if not run_ids:
        return []
    first = server.run(run_ids[0])
    # One search finds all that is running, the runs themselves too as a rule; a fold has no children.
    alone = len(run_ids) == 1 and PARENT in first.tags
    running = [] if alone else server.search([first.experiment], "attributes.status = 'RUNNING'")
    known = {run.run_id: run for run in (*running, first)}
    runs = at_once(lambda run_id: known.get(run_id) or server.run(run_id), run_ids)
    return [*(run for run in running if run.tags.get(PARENT) in run_ids), *runs]


def write(
    server: Server,
    run: Run,
    points: Points | None = None,
    tags: Mapping[str, str] | None = None,
    standing: Standing | None = None,
) -> None:
    """Make the run show these values and tags; what it shows already is not sent.

    standing: what is known to stand there, kept up to date; asked of the server where it is None.
    """
    there = standing_points(server, run, points or {}) if standing is None else standing
    metrics = changes(run, points or {}, there)
    server.log(run.run_id, metrics, tags=_changed(_written(tags or {}), run.tags))
    there.update({(name, point.step): point for name, point in metrics})


def standing_points(server: Server, run: Run, places: Iterable[tuple[str, int]]) -> Standing:
    """What the run shows at these places, or nothing where it shows nothing."""
    steps: dict[str, set[int]] = {}
    for name, step in places:
        if name in run.metrics:
            steps.setdefault(name, set()).add(step)
    # The latest point comes with the run itself; only of a curve there are more.
    alone = [name for name, wanted in steps.items() if wanted == {run.metrics[name].step}]
    standing = {(name, run.metrics[name].step): run.metrics[name] for name in alone}
    return standing | whole_curves(server, run, steps.keys() - alone)


def whole_curves(server: Server, run: Run, names: Iterable[str]) -> Standing:
    """All that the run shows of these metrics."""
    standing: Standing = {}
    for name in sorted(set(names) & run.metrics.keys()):
        for point in server.history(run.run_id, name):
            place = name, point.step
            standing[place] = max(standing.get(place, point), point, key=_order)
    return standing


def changes(run: Run, points: Points, standing: Standing) -> list[Metric]:
    """What has to be written so that the run shows these values.

    MLflow cannot take a value back, but of several at one step it shows the one with the latest time (and then the
    greatest): a value that differs from what stands there gets the next millisecond. One that is not finite is written
    only as NaN over a finite one.
    """
    changed = []
    for (name, step), value in points.items():
        before = standing.get((name, step), Point(math.nan, run.start_time - 1, step))
        value = value if math.isfinite(value) else math.nan
        if value != before.value and not (math.isnan(value) and math.isnan(before.value)):
            changed.append(Metric(name, Point(value, before.timestamp + 1, step)))
    return changed


def not_finite(points: Points) -> list[str]:
    """The metrics with a value that is left out because it is NaN or infinite."""
    return sorted({name for (name, _), value in points.items() if not math.isfinite(value)})


def allowed(name: str) -> str:
    """A name that MLflow takes: letters, digits and `_-. :/`, at most 250 of them; a changed one ends in its hash."""
    taken = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
    if taken == name and len(name) <= LONGEST_NAME:
        return name
    return f"{taken[: LONGEST_NAME - 9]}-{sha256(name.encode()).hexdigest()[:8]}"


def as_text(value: object) -> str:
    """A param's value as MLflow keeps it."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def shortened(text: str) -> str:
    """A value that MLflow takes; a cut one ends in the hash of the whole."""
    if len(text) <= LONGEST_PARAM:
        return text
    ending = f"... sha256 {sha256(text.encode()).hexdigest()[:16]}, see params.json"
    return text[: LONGEST_PARAM - len(ending)] + ending


def _given(tags: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in tags.items() if value is not None}


def _written(tags: Mapping[str, str]) -> dict[str, str]:
    return {allowed(name): value[:LONGEST_TAG] for name, value in tags.items()}


def _changed(wanted: Mapping[str, str], there: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in wanted.items() if there.get(name) != value}


def _order(point: Point) -> tuple[int, float]:
    return point.timestamp, -math.inf if math.isnan(point.value) else point.value
