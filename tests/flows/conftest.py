"""A small screen, local servers for the whole session, and ways to run the benchmark in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from blocks.config import child_environment
from blocks.services import stack as services

ENTRY = {
    "name": "tiny",
    "title": "a simulated screen for tests",
    "task": "single",
    "source": {"kind": "local", "hint": "the file that the test wrote"},
    "labels": {"column": "perturbation", "control": ["control"]},
    "min_genes_per_cell": 20,
    "half_seeds": 2,
    "folds": 2,
}


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[child_environment.Services]:
    """Prefect's and MLflow's servers with a data folder of the session's own; stopped at the end."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALIPERT_DATA", str(folder))
        try:
            yield services.ensure_servers()
        finally:
            services.stop()


@pytest.fixture(scope="session")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw counts of 12 knock-downs x 250 genes."""
    from core.simulate import SimulationSettings, simulate

    path = tmp_path_factory.mktemp("raw") / "screen.h5ad"
    settings = SimulationSettings(seed=7, genes=250, singles=12, cells_per_condition=40, control_cells=120)
    simulate(settings).cells.write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def tiny() -> dict[str, object]:
    """A user's own catalog entry of that screen, as it is written."""
    return ENTRY


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """A user's own catalog entry of that screen."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(ENTRY))
    return path


@pytest.fixture
def run_benchmark(servers: child_environment.Services, entry: Path) -> Callable[..., Path]:
    """Run the benchmark flow in a process of its own, with a data folder of its own; the folder of the results."""

    def run(raw: Path, data: Path, models: list[str], **environment: str) -> Path:
        parameters = {"dataset": str(entry), "models": models, "sources": {"tiny": str(raw)}}
        code = (
            "import json, sys\n"
            "from flows.benchmark import benchmark\n"
            "print('RESULT', benchmark(**json.loads(sys.argv[1])))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(parameters)],
            env=child_environment.child_environment(servers) | {"CALIPERT_DATA": str(data)} | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return Path(done.stdout.rpartition("RESULT ")[2].strip())

    return run


@pytest.fixture
def calipert(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line in a process of its own; without `data`, in a fresh data folder."""

    def run(*arguments: object, data: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flows.cli.main", *map(str, arguments)],
            env={**os.environ, "CALIPERT_DATA": str(data or tmp_path / "data"), "COLUMNS": "120"},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    return run
