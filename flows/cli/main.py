"""The command line. Heavy packages are imported inside the commands, so that `calipert --help` is instant."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler

from core.errors import UserError, shown
from flows.cli.model import app as models_app
from flows.cli.options import Folds, read_folds, read_names, read_pairs

if TYPE_CHECKING:
    from blocks.config.child_environment import Services
    from flows.reproduce import Outcome

CONSOLE = Console(highlight=False)
ERRORS = Console(stderr=True, highlight=False)

app = typer.Typer(
    name="calipert",
    help="Calibrate the metric, then judge the models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

datasets = typer.Typer(no_args_is_help=True, help="Look at data sets.")
app.add_typer(datasets, name="dataset")
app.add_typer(models_app, name="model")

Sources = Annotated[
    list[str] | None,
    typer.Option("--source", help="NAME=FILE: the file to use for a data set or embedding; may be repeated."),
]
Origin = Annotated[
    Literal["raw", "mirror"],
    typer.Option(help="Download the authors' raw file, or the preprocessed mirror; --source comes before either."),
]


@app.command()
def run(
    dataset: Annotated[str, typer.Argument(help="A data set of the catalog, or the path of your own YAML entry.")],
    models: Annotated[str, typer.Option(help="Models or groups of the catalog, separated by commas.")] = "demo",
    folds: Annotated[str | None, typer.Option(help="Number of folds, or leave-one-out.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the models' training.")] = 42,
    origin: Origin = "raw",
    source: Sources = None,
) -> None:
    """Benchmark models on a data set: prepare, train every fold, score, calibrate, report."""
    names, sources, number = read_names(models), read_pairs("--source", source, "NAME=FILE"), read_folds(folds)
    _check_benchmark(dataset, number, origin, names, sources)
    services = _servers()
    from flows.benchmark import benchmark

    results: Path = _flow(
        benchmark, dataset=dataset, models=names, folds=number, seed=seed, origin=origin, sources=sources
    )
    _show(results, services)


@app.command()
def reproduce(
    datasets: Annotated[str, typer.Option(help="Data sets, separated by commas; by default those of the study.")] = "",
    models: Annotated[str, typer.Option(help="Models or groups to benchmark too, separated by commas.")] = "",
    origin: Origin = "raw",
    source: Sources = None,
) -> None:
    """Prepare and calibrate all data sets of the study; what one of them lacks does not stop the others."""
    from tasks.inputs import choose_models, choose_study, list_inputs, resolve_sources

    wanted, names, sources = read_names(datasets), read_names(models), read_pairs("--source", source, "NAME=FILE")
    resolve_sources(list_inputs(choose_models(names)), sources, later=choose_study(wanted, origin).values())
    services = _servers()
    from flows.cli.console import draw_outcomes
    from flows.reproduce import NoneDone
    from flows.reproduce import reproduce as reproduce_flow

    try:
        outcomes: list[Outcome] = _flow(reproduce_flow, datasets=wanted, models=names, origin=origin, sources=sources)
    except NoneDone as error:
        CONSOLE.print(draw_outcomes(error.outcomes))
        raise
    CONSOLE.print(draw_outcomes(outcomes))
    CONSOLE.print(_addresses(services), soft_wrap=True)
    if any(outcome.outcome != "done" for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def calibrate(
    file: Annotated[Path, typer.Argument(help="cells.h5ad, a preprocessed mirror file, or any h5ad with log1p X.")],
    out: Annotated[Path, typer.Option(help="Folder for scores.csv and calibration.csv.")],
    column: Annotated[str, typer.Option(help="Column of obs with the conditions.")] = "condition",
    control: Annotated[str, typer.Option(help="Label of the control cells.")] = "control",
    covariate: Annotated[str | None, typer.Option(help="Column of obs with the covariate (cell line, donor).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of halves and folds that are drawn.")] = 42,
    half_seeds: Annotated[int, typer.Option(min=1, help="Number of half splits.")] = 5,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Of a mirror file, recompute the stored profiles and DE results.")
    ] = False,
) -> None:
    """Calibrate the metrics on one file; needs no server, MLflow or model."""
    from core.scoring.file_calibration import FileOptions, calibrate_file
    from flows.cli.console import draw_verdicts

    options = FileOptions(column, control, covariate, seed, half_seeds)
    with CONSOLE.status(f"calibrating {file.name}"):
        scores, calibration = calibrate_file(file, options, recompute=recompute)
    out.mkdir(parents=True, exist_ok=True)
    # One covariate needs no column of its own.
    columns = ["covariate"] * (scores["covariate"].nunique() > 1)
    _write_csv(scores[["model", *columns, "condition", "metric", "value"]], out / "scores.csv")
    _write_csv(calibration, out / "calibration.csv")
    CONSOLE.print(draw_verdicts(calibration, CONSOLE.width))
    CONSOLE.print(f"scores: {out / 'scores.csv'}\ncalibration: {out / 'calibration.csv'}")


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help="h5ad of conditions x genes, X predicted mean log1p(CP10k).")],
    dataset: Annotated[str, typer.Option(help="The data set that was predicted.")],
    name: Annotated[str, typer.Option(help="What to call the model.")] = "predictions",
    folds: Annotated[str | None, typer.Option(help="Number of folds, or leave-one-out.")] = None,
    origin: Origin = "raw",
    source: Sources = None,
) -> None:
    """Score predictions made elsewhere against a data set and its calibrated metrics."""
    from tasks.inputs import check_model_name

    sources, number = read_pairs("--source", source, "NAME=FILE"), read_folds(folds)
    _check_benchmark(dataset, number, origin, [], sources)
    check_model_name(name)
    if not predictions.is_file():
        raise UserError(predictions, "file", "no such file", "check the path")
    services = _servers()
    from flows.score import score as score_flow

    results: Path = _flow(
        score_flow,
        dataset=dataset,
        predictions=predictions.resolve(),
        name=name,
        folds=number,
        origin=origin,
        sources=sources,
    )
    _show(results, services)


@app.command(name="list")
def list_(
    kind: Annotated[str, typer.Argument(help="datasets, models, embeddings, groups or pretrained.")] = "datasets",
) -> None:
    """List what the catalog holds, and what each entry needs: downloads, containers, secrets."""
    from core.catalog.registry import FOLDERS
    from flows.cli.listing import listing

    kinds = {folder: kind for kind, folder in FOLDERS.items()}
    if kind not in kinds:
        raise UserError("calipert list", "kind", repr(kind), f"one of: {', '.join(kinds)}")
    CONSOLE.print(listing(kinds[kind]))


@datasets.command()
def check(
    dataset: Annotated[str, typer.Argument(help="The path of your own YAML entry, or a data set of the catalog.")],
    source: Sources = None,
) -> None:
    """Say what an entry would do with its file (labels, cells per condition, what is dropped), without doing it."""
    from blocks.config.catalog import open_catalog
    from core.prepare.check import check_dataset
    from flows.cli.console import draw_check
    from tasks.inputs import resolve_sources

    spec = open_catalog().dataset(dataset)
    file = resolve_sources([spec], read_pairs("--source", source, "NAME=FILE")).get(spec.name)
    if file is None:
        remedy = f"download {getattr(spec.source, 'url', 'it')} and name it: --source {spec.name}=FILE"
        raise UserError(dataset, "source", "an entry that can be read, but no file to check it with", remedy)
    found = check_dataset(file, spec)
    CONSOLE.print(draw_check(found, spec.name))
    if found.faults:
        raise UserError(file, "conditions", "; ".join(found.faults), f"mend the entry {dataset}, or give more data")


@app.command()
def status() -> None:
    """Show what runs, ran, failed and why: servers, workers, flow runs, GPUs and the store. Starts nothing."""
    from datetime import UTC, datetime

    from flows.cli.status import snapshot
    from flows.cli.status_screen import screen

    now = datetime.now(UTC)
    CONSOLE.print(screen(snapshot(now), now))


@app.command()
def settings() -> None:
    """Show every setting: its value, where that comes from, and what it is for. Passwords and keys are hidden."""
    from flows.cli.settings_table import build_settings_table

    CONSOLE.print(build_settings_table())


@app.command()
def env() -> None:
    """Start the local servers if need be, and print the shell lines for using them: eval "$(calipert env)"."""
    from blocks.config.child_environment import exports
    from blocks.services.stack import ensure_servers

    typer.echo(exports(ensure_servers()), nl=False)


def main() -> None:
    """Entry point: an error that the user can mend is shown on one screen, with exit status 2."""
    try:
        app()
    except UserError as error:
        from flows.cli.console import draw_error

        ERRORS.print(draw_error(error))
        sys.exit(2)


def _check_benchmark(
    dataset: str, folds: Folds, origin: Literal["raw", "mirror"], models: list[str], sources: dict[str, str]
) -> None:
    """What can be refused before anything is started."""
    from tasks.inputs import choose_dataset, choose_models, list_inputs, resolve_sources

    spec = choose_dataset(dataset, folds, origin)
    resolve_sources([spec, *list_inputs(choose_models(models))], sources)


def _servers() -> Services:
    from blocks.config.child_environment import adopt
    from blocks.services.stack import ensure_servers

    with CONSOLE.status("starting the local Prefect and MLflow servers (about ten seconds, once)"):
        services = ensure_servers()
    adopt(services)
    # The console shows our own progress, and a failure once; Prefect's whole log is in its UI.
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
    return services


def _flow(flow: Any, **parameters: object) -> Any:
    """Run a flow in this process: our own progress on the console, Prefect's log in its UI."""
    ours = logging.getLogger("calipert")
    ours.setLevel(logging.INFO)
    ours.addHandler(RichHandler(console=CONSOLE, show_path=False, show_level=False, log_time_format="%H:%M:%S"))
    from blocks.engines.base import ModelFailed

    try:
        return flow(**parameters)
    except ModelFailed as error:
        made, needing = ("embedding", "models that use it") if error.stage == "embed" else ("model", "it")
        remedy = f"mend the {made}, or leave {needing} out with --models; the whole log is in Prefect"
        raise UserError(made, "output", str(error), remedy) from error


def _write_csv(table: Any, path: Path) -> None:
    from blocks.local.files import replace_file

    with replace_file(path) as new:
        table.to_csv(new, index=False)


def _show(results: Path, services: Services) -> None:
    """The result table, then where to look further."""
    import pandas as pd

    from core.report.files import LEADERBOARD
    from core.scoring.files import UNPREDICTED
    from flows.cli.console import draw_results

    CONSOLE.print(draw_results(pd.read_parquet(results / LEADERBOARD), CONSOLE.width))
    unpredicted = pd.read_parquet(results / UNPREDICTED)
    for model, rows in unpredicted.groupby("model", observed=True):
        reasons = shown(sorted(set(rows["reason"])), 3)
        CONSOLE.print(f"{model} did not predict {len(rows)} conditions: {reasons}", style="yellow")
    CONSOLE.print(f"\nReport:  {results / 'report.html'}{_addresses(services)}", soft_wrap=True)


def _addresses(services: Services) -> str:
    return (
        f"\nPrefect: {services.prefect}\nMLflow:  {services.mlflow} (choose “Model training”)\n"
        "Both servers keep running on this machine only; `make down` stops them."
    )


if __name__ == "__main__":
    main()
