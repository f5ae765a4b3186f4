"""Each benchmark runs, at toy size, and finds that its results and the peer's agree; no time is judged."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from blocks.config.paths import PROJECT_ROOT
from tests.helpers.tiny_screen import SIMULATED


def run(name: str, *options: str, root: Path = PROJECT_ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120", "PYTHONPATH": str(PROJECT_ROOT)}
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed (the extra `bench`)")


TOY_FOLD = "--conditions 12 --cells 600 --genes 40"
BENCHMARKS = [
    pytest.param(
        "differential_expression",
        "--conditions 12 --cells 1300 --genes 40 --repeats 1",
        "adjusted p",
        id="differential",
    ),
    pytest.param("metrics", "--conditions 20 --genes 80 --sample 5 --repeats 1", "pds", id="metrics"),
    pytest.param(
        "edistance",
        "--conditions 6 --cells 12 --more-conditions 9 --repeats 1",
        "E-distances",
        id="edistance",
        marks=needs("scperturb"),
    ),
    pytest.param(
        "calibration",
        "--conditions 12 --cells 20 --genes 150 --repeats 1",
        "pearson_deltapert: DRF",
        id="calibration",
        marks=needs("scperteval"),
    ),
    pytest.param(
        "training",
        f"--part --models fmlp,presage,sclambda {TOY_FOLD}",
        "presage: val_loss",
        id="training",
    ),
]


@pytest.mark.parametrize(("name", "options", "compared"), BENCHMARKS)
def test_results_agree_with_the_peers(name: str, options: str, compared: str) -> None:
    done = run(name, *options.split())
    assert done.returncode == 0, done.stdout + done.stderr
    times, _, agreement = done.stdout.partition("\nAgreement\n")
    assert re.search(r"\d cores, BLAS threads \d+, .*numpy \d", times)
    assert re.search(r"\d\.\d{3} +\d[\d,]*\.\dx", times)
    assert re.search(rf"^{re.escape(compared)} .* yes$", agreement, re.MULTILINE)
    assert "NO" not in agreement.split()
    if name == "differential_expression":
        passes = re.findall(r"^(\d+) +(\d+\.\d\d) +\d", times, re.MULTILINE)
        assert passes == [("100", "1.00"), ("300", "1.00")]


def test_a_peer_that_is_trained_with_other_cells_is_found_out(tmp_path: Path) -> None:
    shutil.copytree(PROJECT_ROOT / "benchmarks", tmp_path / "benchmarks")
    peer = tmp_path / "benchmarks" / "dense_rows" / "model.py"
    code = peer.read_text(encoding="utf-8")
    changed = code.replace("sampler=batch.tolist()", "sampler=((batch + 1) % len(cells)).tolist()")
    assert changed != code
    peer.write_text(changed, encoding="utf-8")
    done = run("training", "--part", "--models", "fmlp", *TOY_FOLD.split(), root=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^fmlp: train_loss .* NO$", done.stdout, re.MULTILINE)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a made-up GPU beside real ones is refused")
def test_with_a_gpu_whole_trainings_stand_beside_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALIPERT_GPUS", "7")
    monkeypatch.setenv("CALIPERT_LOCKS", str(tmp_path / "locks"))
    done = run("training", "--models", "fmlp,gears", *TOY_FOLD.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on GPU 7, which torch cannot use: on the CPU\n" in done.stdout
    assert re.search(r"^gears, published, on an H200 +4,680\.000", done.stdout, re.MULTILINE)
    assert re.search(r"^gears, calipert +\d+\.\d{3} +\d[\d,]*\.\dx +<= 480 s", done.stdout, re.MULTILINE)
    assert re.search(r"^fmlp, calipert +\d+\.\d{3} +<= 20 s", done.stdout, re.MULTILINE)
    assert re.search(r"^fmlp, calipert +100 +cells +\d[\d,]*\.\d ", done.stdout, re.MULTILINE), "all epochs"
    assert "Agreement" not in done.stdout, "there is no peer"


def test_the_largest_models_are_timed_without_a_peer() -> None:
    done = run("training", "--part", "--models", "gears,scgpt", *TOY_FOLD.split())
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("gears", "scgpt"):
        assert re.search(rf"^{name}, calipert +2 +perturbed cells +\d[\d,]*\.\d ", done.stdout, re.MULTILINE), name
    assert "published" not in done.stdout


def test_the_preparation_says_where_time_memory_and_disk_went(tmp_path: Path) -> None:
    sizes = "--cells 3000 --genes 300 --conditions 20 --filled 0.8 --half-seeds 2"
    done = run("prepare", "--folder", str(tmp_path), *sizes.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3,000 cells x 300 genes" in done.stdout
    for stage in ("cells", "reference", "quality"):
        assert re.search(rf"{stage} +\S? *\d+\.\d", done.stdout), stage
    for name in ("counting genes and cells", "writing cells", "principal coordinates"):
        assert name in done.stdout
    assert [path.suffix for path in tmp_path.iterdir()] == [".h5ad"]  # the raw file, to be used again


def test_what_is_written_to_mlflow_is_what_its_own_client_writes() -> None:
    done = run(
        "tracking", *["--models", "2", "--folds", "2", "--conditions", "3", "--half-seeds", "1", "--epochs", "4"]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    times, _, agreement = done.stdout.partition("\nAgreement\n")
    assert re.search(r"^calipert +\d+\.\d{3} +\d[\d,]*\.\dx", times, re.MULTILINE)
    assert re.search(r"^summaries and curves, read back .* yes$", agreement, re.MULTILINE)


def test_the_overhead_is_told_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "tiny.yaml").write_text(yaml.safe_dump(SIMULATED))
    monkeypatch.setenv("CALIPERT_CATALOG", str(tmp_path))
    sizes = "--dataset tiny --models ridge_coexpression --tasks 3 --repeats 1"
    done = run("overhead", *sizes.split())
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("in process, the flow", "through a worker, from submission to end", "one task"):
        assert re.search(rf"{part} +\d+\.\d{{3}}", done.stdout), part


def test_help_names_the_sizes() -> None:
    done = run("metrics", "--help")
    assert done.returncode == 0, done.stderr
    assert "--conditions" in done.stdout
    assert "--genes" in done.stdout
