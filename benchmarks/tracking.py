"""Write a large benchmark to MLflow: 20 models x 5 folds x 2,500 conditions, on a private server.

    python -m benchmarks.tracking

What is written is made up. The peer is what one would write first: MLflow's fluent functions, one call per value; it
writes a few of the models, and its time is scaled. Both results are read back and compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import typer

from benchmarks.comparison import CONSOLE, Timing, agreement, machine, show_agreement, show_times, timed
from blocks.config.child_environment import build_environment
from blocks.engines.base import Usage
from blocks.services import stack as services
from blocks.tracking import curves as mlflow_curves
from blocks.tracking.tables import SUMMARY_COLUMNS
from blocks.tracking.tracker import MLflowTracking, ModelRun
from core.scoring.metrics import METRICS
from core.scoring.scores import COLUMNS

DATASET = "made_up"
CURVES = ("loss", "val_loss")
# A training of ten seconds writes as often as that while it runs.
LIVE_WRITES = 2
AIM = "below 30 s"
# As large as a report with its figures is.
REPORT_BYTES = 500_000


class Results(NamedTuple):
    """What a benchmark has to write. board: the leaderboard. curves: model and fold -> training.jsonl."""

    board: pd.DataFrame
    scores: Path
    report: Path
    curves: dict[tuple[str, int], Path]


def main(
    models: Annotated[int, typer.Option(help="Models, each a run.")] = 20,
    folds: Annotated[int, typer.Option(help="Folds, each a run per model.")] = 5,
    conditions: Annotated[int, typer.Option(help="Conditions that are scored.")] = 2_500,
    half_seeds: Annotated[int, typer.Option(help="Half splits that they are scored for.")] = 5,
    epochs: Annotated[int, typer.Option(help="Points of each curve.")] = 100,
    peer_models: Annotated[int, typer.Option(help="Models that the peer writes.")] = 1,
) -> None:
    """Write it three ways, and print times and agreement."""
    with TemporaryDirectory(prefix="calipert-") as folder, _private_server(Path(folder)) as uri:
        results = make_up(Path(folder), models, folds, conditions, half_seeds, epochs)
        CONSOLE.print(machine("mlflow"))
        size = results.scores.stat().st_size / 1e6
        CONSOLE.print(f"scores.parquet: {models * conditions * half_seeds * len(METRICS):,} rows, {size:.1f} MB\n")
        block = MLflowTracking(tracking_uri=uri)
        steps: list[Timing] = []
        # Every event is written that is told live, however short the time since the last.
        with mock.patch.object(mlflow_curves, "LIVE_SECONDS", 0.0):
            seconds, _ = timed(lambda: write(block, results, folds, steps))
            again, _ = timed(lambda: write(block, results, folds, [], trained=False))
        sample = list(results.board["model"].unique())[:peer_models]
        peer, _ = timed(lambda: write_with_fluent_functions(uri, results, sample, folds))
        scaled = peer * models / len(sample)
        show_times(
            f"{models} models x {folds} folds x {conditions:,} conditions",
            [
                Timing(f"mlflow, one call per value (scaled from {len(sample)} models)", scaled),
                Timing("calipert", seconds, scaled / seconds, AIM),
                *steps,
                Timing("calipert, all of it once more", again),
            ],
        )
        show_agreement(_compared(uri, sample))


@contextmanager
def _private_server(folder: Path) -> Iterator[str]:
    """Yield the address of an MLflow server of its own, which is gone afterwards."""
    with mock.patch.dict(os.environ, CALIPERT_DATA=str(folder)):
        try:
            running = services.ensure_servers()
            quiet = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
            with mock.patch.dict(os.environ, build_environment(running) | quiet):
                yield running.mlflow
        finally:
            services.stop()


def make_up(folder: Path, models: int, folds: int, conditions: int, half_seeds: int, epochs: int) -> Results:
    """Results as a benchmark has them, with the real metrics and columns."""
    rng = np.random.default_rng(0)
    names, metrics = [f"model_{i:02d}" for i in range(models)], [metric.name for metric in METRICS]
    board = pd.MultiIndex.from_product([names, metrics], names=["model", "metric"]).to_frame(index=False)
    for column in SUMMARY_COLUMNS:
        board[column] = rng.random(len(board))
    board["kind"], board["calibrated"], board["in_panel"] = "model", True, True
    levels = {
        "model": names,
        "condition": [f"GENE{i:04d}" for i in range(conditions)],
        "half_seed": range(42, 42 + half_seeds),
        "metric": metrics,
    }
    scores = pd.MultiIndex.from_product(list(levels.values()), names=list(levels)).to_frame(index=False)
    scores = scores.assign(covariate="all", fold=0, seed=42, value=rng.random(len(scores)))[COLUMNS]
    scores.to_parquet(folder / "scores.parquet", index=False)
    curves = {}
    for name in names:
        for fold in range(folds):
            path = folder / f"{name}.{fold}.jsonl"
            values = rng.random((epochs, len(CURVES)))
            path.write_text("".join(json.dumps(event) + "\n" for event in _events(values)), encoding="utf-8")
            curves[name, fold] = path
    report = folder / "report.html"
    report.write_bytes(rng.bytes(REPORT_BYTES))
    return Results(board, folder / "scores.parquet", report, curves)


def _events(values: np.ndarray) -> Iterator[dict[str, object]]:
    for step, row in enumerate(values):
        for name, value in zip(CURVES, row, strict=True):
            yield {"event": "metric", "name": name, "step": step, "value": float(value)}


def write(block: MLflowTracking, results: Results, folds: int, steps: list[Timing], *, trained: bool = True) -> None:
    """Write all that a benchmark writes, in its order.

    steps: receives the time of each. trained: false where all models
    are in the store already.
    """

    def step(what: str, work: Callable[[], Any]) -> Any:
        seconds, done = timed(work)
        steps.append(Timing(f"  {what}", seconds))
        return done

    wanted = [
        ModelRun(name, 42, f"made-up/{name}", "model", {"alpha": 0.1, "layers": [512, 512]}, "engine", range(folds))
        for name in results.board["model"].unique()
    ]
    runs = step(
        "opening the runs", lambda: block.open_runs(DATASET, "made-up", wanted, digest="d" * 32, source="made up")
    )
    ids = {name: run.run_id for name, run in runs.items()}

    def curves() -> None:
        # As the folds of a benchmark run beside each other.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            paths = list(results.curves.values())
            ids = [runs[name].folds[fold] for name, fold in results.curves]
            list(pool.map(_train, repeat(block), ids, paths, repeat(trained)))

    step("curves and ends of the folds", curves)
    step("leaderboard", lambda: block.log_leaderboard(results.board, ids))
    step("scores", lambda: block.log_scores(results.scores, ids))
    step("report", lambda: block.log_report(results.report, ids.values()))
    step("ending the runs", lambda: block.finish(*ids.values()))


def _train(block: MLflowTracking, run_id: str, training: Path, trained: bool) -> None:
    """Write what is written of one fold, at the start, during and at the end of its training."""
    live = block.follow_curve(run_id)
    if trained:
        with training.open(encoding="utf-8") as lines:
            for line in islice(lines, LIVE_WRITES):
                live(json.loads(line))
        block.log_usage(run_id, Usage(seconds=10.0, cpu_seconds=9.0, peak_memory_bytes=10**9, device="cpu"))
    block.log_curve(run_id, training)
    block.finish(run_id)


def write_with_fluent_functions(uri: str, results: Results, models: list[str], folds: int) -> None:
    """Write the same for some models, one call per value, and with each the whole scores.parquet."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("peer")
    for model in models:
        with mlflow.start_run(run_name=model):
            for name, value in {"model": model, "seed": 42, "alpha": 0.1, "layers": [512, 512]}.items():
                mlflow.log_param(name, value)
            for fold in range(folds):
                with mlflow.start_run(run_name=f"{model} fold {fold}", nested=True):
                    mlflow.log_param("fold", fold)
                    for line in results.curves[model, fold].read_text(encoding="utf-8").splitlines():
                        event = json.loads(line)
                        mlflow.log_metric(event["name"], event["value"], step=event["step"])
            for row in results.board[results.board["model"] == model].to_dict("records"):
                for column in SUMMARY_COLUMNS:
                    mlflow.log_metric(f"{row['metric']}.{column}", row[column])
            mlflow.log_artifact(str(results.scores))


def _compared(uri: str, models: list[str]) -> list[Any]:
    ours, theirs = (_read_back(uri, name, models) for name in (f"calipert/{DATASET}", "peer"))
    places = sorted(theirs)
    return [
        agreement(
            "summaries and curves, read back",
            [ours.get(place, np.nan) for place in places],
            [theirs[place] for place in places],
            0.0,
            "absolute",
        )
    ]


def _read_back(uri: str, experiment: str, models: list[str]) -> Mapping[tuple[str, str, int], float]:
    """(model and fold, metric, step) -> value, as MLflow's own client reads them."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    read = {}
    for run in client.search_runs([found.experiment_id], max_results=10_000):
        name = (run.info.run_name or "").replace(" seed 42", "")
        if name.split()[0] in models:
            for metric in run.data.metrics:
                if not metric.startswith("system."):
                    points = client.get_metric_history(run.info.run_id, metric)
                    read |= {(name, metric, point.step): point.value for point in points}
    return read


if __name__ == "__main__":
    typer.run(main)
