"""The command line. Heavy packages are imported inside the commands, so that `calipert --help` is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from core.errors import UserError
from flows.cli.model import app as models_app
from flows.cli.options import Dataset, Folds, Origin, Sources, read_folds, read_names, read_sources
from flows.cli.session import CONSOLE, run_flow, show_addresses, show_results, start_servers

if TYPE_CHECKING:
    from flows.reproduce import Outcome

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


def _check_request(
    dataset: str, models: list[str], folds: str | None, origin: str, source: list[str] | None
) -> dict[str, Any]:
    """Return parameters of a flow; refuse, before a server starts, what can be refused."""
    from tasks.inputs import check_request

    request: dict[str, Any] = {
        "dataset": dataset,
        "folds": read_folds(folds),
        "origin": origin,
        "sources": read_sources(source),
    }
    check_request(models=models, **request)
    return request


@app.command()
def run(
    dataset: Dataset,
    models: Annotated[str, typer.Option(help="Models or groups of the catalog, separated by commas.")] = "demo",
    folds: Folds = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the models' training.")] = 42,
    origin: Origin = "raw",
    source: Sources = None,
) -> None:
    """Benchmark models on a data set: prepare, train every fold, score, calibrate, report."""
    names = read_names(models)
    request = _check_request(dataset, names, folds, origin, source)
    services = start_servers()
    from flows.benchmark import benchmark

    show_results(run_flow(benchmark, models=names, seed=seed, **request), services)


@app.command()
def reproduce(
    datasets: Annotated[str, typer.Option(help="Data sets, separated by commas; by default those of the study.")] = "",
    models: Annotated[str, typer.Option(help="Models or groups to benchmark too, separated by commas.")] = "",
    origin: Origin = "raw",
    source: Sources = None,
) -> None:
    """Prepare and calibrate all data sets of the study; what one of them lacks does not stop the others."""
    from tasks.inputs import choose_models, choose_study, list_inputs, resolve_sources

    wanted, names, sources = read_names(datasets), read_names(models), read_sources(source)
    resolve_sources(list_inputs(choose_models(names)), sources, later=choose_study(wanted, origin).values())
    services = start_servers()
    from flows.cli.console import make_outcome_table
    from flows.reproduce import NoneDone
    from flows.reproduce import reproduce as reproduce_flow

    try:
        outcomes: list[Outcome] = run_flow(
            reproduce_flow, datasets=wanted, models=names, origin=origin, sources=sources
        )
    except NoneDone as error:
        CONSOLE.print(make_outcome_table(error.outcomes))
        raise
    CONSOLE.print(make_outcome_table(outcomes))
    show_addresses(services)
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
    from blocks.local.files import replace_file
    from core.scoring.file_calibration import FileOptions, calibrate_file
    from flows.cli.console import make_verdict_table

    options = FileOptions(column, control, covariate, seed, half_seeds)
    with CONSOLE.status(f"calibrating {file.name}"):
        scores, calibration = calibrate_file(file, options, recompute=recompute)
    out.mkdir(parents=True, exist_ok=True)
    # One covariate needs no column of its own.
    columns = ["covariate"] * (scores["covariate"].nunique() > 1)
    tables = {"scores": scores[["model", *columns, "condition", "metric", "value"]], "calibration": calibration}
    for name, table in tables.items():
        with replace_file(out / f"{name}.csv") as new:
            table.to_csv(new, index=False)
    CONSOLE.print(make_verdict_table(calibration, CONSOLE.width))
    CONSOLE.print(f"scores: {out / 'scores.csv'}\ncalibration: {out / 'calibration.csv'}")


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help="h5ad of conditions x genes, X predicted mean log1p(CP10k).")],
    dataset: Annotated[str, typer.Option(help="The data set that was predicted.")],
    name: Annotated[str, typer.Option(help="What to call the model.")] = "predictions",
    folds: Folds = None,
    origin: Origin = "raw",
    source: Sources = None,
) -> None:
    """Score predictions made elsewhere against a data set and its calibrated metrics."""
    from tasks.inputs import check_model_name

    request = _check_request(dataset, [], folds, origin, source)
    check_model_name(name)
    if not predictions.is_file():
        raise UserError(predictions, "file", "no such file", "check the path")
    services = start_servers()
    from flows.score import score as score_flow

    show_results(run_flow(score_flow, predictions=predictions.resolve(), name=name, **request), services)


@app.command(name="list")
def list_(
    kind: Annotated[str, typer.Argument(help="datasets, models, embeddings, groups or pretrained.")] = "datasets",
) -> None:
    """List what the catalog holds, and what each entry needs: downloads, containers, secrets."""
    from core.catalog.registry import FOLDERS
    from flows.cli.listing import make_listing

    kinds = {folder: kind for kind, folder in FOLDERS.items()}
    if kind not in kinds:
        raise UserError("calipert list", "kind", repr(kind), f"one of: {', '.join(kinds)}")
    CONSOLE.print(make_listing(kinds[kind]))


@datasets.command()
def check(
    dataset: Annotated[str, typer.Argument(help="The path of your own YAML entry, or a data set of the catalog.")],
    source: Sources = None,
) -> None:
    """Say what an entry would do with its file (labels, cells per condition, what is dropped), without doing it."""
    from blocks.config.catalog import open_catalog
    from core.prepare.check import check_dataset
    from flows.cli.console import make_check_table
    from tasks.inputs import resolve_sources

    spec = open_catalog().dataset(dataset)
    file = resolve_sources([spec], read_sources(source)).get(spec.name)
    if file is None:
        remedy = f"download {getattr(spec.source, 'url', 'it')} and name it: --source {spec.name}=FILE"
        raise UserError(dataset, "source", "an entry that can be read, but no file to check it with", remedy)
    found = check_dataset(file, spec)
    CONSOLE.print(make_check_table(found, spec.name))
    if found.faults:
        raise UserError(file, "conditions", "; ".join(found.faults), f"correct the entry {dataset}, or give more data")


@app.command()
def status() -> None:
    """Show what runs, ran, failed and why: servers, workers, flow runs, GPUs and the store. Starts nothing."""
    from datetime import UTC, datetime

    from flows.cli.status import take_snapshot
    from flows.cli.status_screen import make_screen

    now = datetime.now(UTC)
    CONSOLE.print(make_screen(take_snapshot(now), now))


@app.command()
def settings() -> None:
    """Show every setting: its value, where that comes from, and what it is for. Passwords and keys are hidden."""
    from flows.cli.listing import build_settings_table

    CONSOLE.print(build_settings_table())


@app.command()
def env() -> None:
    """Start the local servers if need be, and print the shell lines for using them: eval "$(calipert env)"."""
    from blocks.config.child_environment import format_exports
    from blocks.services.stack import ensure_servers

    typer.echo(format_exports(ensure_servers()), nl=False)


def main() -> None:
    """Run the command line; an error that the user can correct is shown on one screen, with exit status 2."""
    try:
        app()
    except UserError as error:
        from flows.cli.console import make_error_panel

        ERRORS.print(make_error_panel(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
