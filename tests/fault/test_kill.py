"""SIGKILL in the middle of things: of a benchmark's processes, of a worker, of Prefect's and of MLflow's server.

`make test-platform` makes one round of each kind, `make fault` ten (CALIPERT_FAULT_ROUNDS). After each the benchmark is
started again to its end, and must leave what an undisturbed one leaves. The moments are drawn with a fixed seed;
CALIPERT_FAULT_SEED chooses others.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from blocks.config.paths import PROJECT_ROOT
from blocks.services.daemons import MARK
from tests.helpers.tiny_screen import SIMULATED

ROUNDS = int(os.environ.get("CALIPERT_FAULT_ROUNDS", "1"))
SEED = int(os.environ.get("CALIPERT_FAULT_SEED", "1"))
# One suffices: each of its folds is a training of its own, two at a time.
MODELS = ("ridge_coexpression",)
SAME = ("scores.parquet", "calibration.parquet", "leaderboard.parquet", "report.html")
VICTIMS = ("worker-cpu", "worker-gpu", "prefect", "mlflow")


class Place:
    """A data folder with servers of its own, and all that runs there. folder: holds `data` and `tmp`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        (folder / "tmp").mkdir(parents=True)
        (folder / "catalog" / "datasets").mkdir(parents=True)
        (folder / "catalog" / "datasets" / "tiny.yaml").write_text(yaml.safe_dump(SIMULATED), encoding="utf-8")

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "CALIPERT_DATA": str(self.data),
            "CALIPERT_CATALOG": str(self.folder / "catalog"),
            "CALIPERT_GPUS": "none",
            "TMPDIR": str(self.folder / "tmp"),
            "COLUMNS": "120",
        }

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.folder / "log").open("ab")
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=PROJECT_ROOT,
            env=self.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def call(self, *command: str) -> None:
        code = self.start(*command).wait(timeout=600)
        assert code == 0, (self.folder / "log").read_text(encoding="utf-8", errors="replace")[-5000:]

    def benchmark(self) -> subprocess.Popen[bytes]:
        return self.start("-m", "flows.cli.main", "run", "tiny", "--models", ",".join(MODELS))

    def up(self) -> None:
        self.call("-m", "tests.helpers.few_deployments", "up", "benchmark/tiny", "train-fold/any")

    def down(self) -> None:
        self.call("-m", "deployments.local", "down")

    def services(self) -> dict[str, psutil.Process]:
        rows = json.loads((self.data / "services.json").read_text(encoding="utf-8"))
        found = {}
        for row in rows:
            with suppress(psutil.NoSuchProcess):
                found[row["name"]] = psutil.Process(row["pid"])
        return found

    def ports(self) -> dict[str, int]:
        rows = json.loads((self.data / "services.json").read_text(encoding="utf-8"))
        return {row["name"]: row["port"] for row in rows}

    def manifests(self) -> dict[str, tuple[int, bytes]]:
        """Every finished artifact: its inode (another one if it was made again) and manifest."""
        return {
            str(path): (path.stat().st_ino, path.read_bytes())
            for path in self.data.glob("store/[a-z]*/*/manifest.json")
        }

    def results(self) -> dict[str, bytes]:
        return {name: (self.data / "reports" / "tiny" / name).read_bytes() for name in SAME}

    def litter(self) -> list[str]:
        """What a killed process left: temporary files anywhere, and nothing else is in these places.

        What Prefect keeps of ended runs in a worker's own temporary folder goes with the worker.
        """
        places = [self.folder / "tmp", *(self.data / name for name in ("scratch", "checkpoints", "store/.temporary"))]
        left = [path for place in places if place.exists() for path in place.rglob("*") if path.is_file()]
        left += [path for path in (self.data / "reports").glob(".*") if path.is_dir()]
        left += list(self.data.rglob("*.partial"))
        # A lock is a file that stays, held or not.
        return sorted(str(path.relative_to(self.folder)) for path in left if path.suffix != ".lock")

    def orphans(self) -> list[psutil.Process]:
        """What runs here and is neither a service nor one of the flow runs under it: a benchmark, a model, what
        supervises it. The environment of a model has no variable of ours, but its home is in the data folder."""
        mine = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                known = process.environ()
                is_model = known.get("HOME", "").startswith(str(self.data / "scratch"))
                is_ours = known.get("CALIPERT_DATA") == str(self.data) and MARK not in known
                if (is_model or is_ours) and process.status() != psutil.STATUS_ZOMBIE:
                    mine.append(process)
        return mine

    def mlflow_runs(self) -> list[dict[str, str]]:
        url = f"http://127.0.0.1:{self.ports()['mlflow']}/api/2.0/mlflow"
        found = httpx.get(
            f"{url}/experiments/get-by-name", params={"experiment_name": "calipert/tiny"}, timeout=60
        ).json()
        query = {"experiment_ids": [found["experiment"]["experiment_id"]], "max_results": 1000}
        runs = httpx.post(f"{url}/runs/search", json=query, timeout=60).json()["runs"]
        return [
            {tag["key"]: tag["value"] for tag in run["data"]["tags"]} | {"status": run["info"]["status"]}
            for run in runs
        ]

    def flow_runs(self, **states: list[str]) -> list[dict[str, str]]:
        url = f"http://127.0.0.1:{self.ports()['prefect']}/api/flow_runs/filter"
        return httpx.post(url, json={"flow_runs": {"state": {"type": states}}} if states else {}, timeout=30).json()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, bytes], float]]:
    """The results of a benchmark that nobody disturbs, and how many seconds it took."""
    place = Place(tmp_path_factory.mktemp("undisturbed"))
    try:
        place.call("-m", "flows.cli.main", "env")
        began = time.monotonic()
        assert place.benchmark().wait(timeout=600) == 0, (place.folder / "log").read_text(encoding="utf-8")[-5000:]
        yield place.results(), time.monotonic() - began
    finally:
        place.down()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Where the killing goes on."""
    place = Place(tmp_path_factory.mktemp("disturbed"))
    try:
        place.call("-m", "flows.cli.main", "env")
        yield place
    finally:
        place.down()
        assert place.orphans() == []
        assert not (place.data / "tmp").exists()


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it; nothing if it has ended by itself."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def fresh(place: Place) -> None:
    """Forget all artifacts, so that a round begins at the beginning. MLflow and Prefect keep theirs: nothing may be
    told twice there over all rounds."""
    import shutil

    for name in ("store", "reports"):
        shutil.rmtree(place.data / name, ignore_errors=True)


def require_as_undisturbed(place: Place, results: dict[str, bytes], finished: dict[str, tuple[int, bytes]]) -> None:
    """The state after a disturbed benchmark has come to its end."""
    assert place.results() == results
    now = place.manifests()
    assert {path: now.get(path) for path in finished} == finished, "a finished artifact was made again"
    runs = place.mlflow_runs()
    keys = [run["calipert.key"] for run in runs]
    assert len(keys) == len(set(keys)), "a run is in MLflow twice"
    assert {run["status"] for run in runs} == {"FINISHED"}
    # A worker tidies up after a run that has ended.
    deadline = time.monotonic() + 15
    while (place.orphans() or place.litter()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert place.litter() == []
    assert place.orphans() == []


def test_a_model_that_runs_is_found(place: Place) -> None:
    """The control of all that follows: what is looked for can be found."""
    process = place.benchmark()
    try:
        deadline = time.monotonic() + 120
        while "model.py train" not in commands(place):
            assert process.poll() is None, "the benchmark ended before a model was seen"
            assert time.monotonic() < deadline
        assert "flows.cli.main run tiny" in commands(place)
    finally:
        kill(tree(process.pid))
        process.wait()


def commands(place: Place) -> str:
    """The command lines of what would count as orphans, one a line."""
    found = []
    for process in place.orphans():
        with suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return "\n".join(found)


@pytest.mark.parametrize("number", range(ROUNDS))
@pytest.mark.parametrize("killed", ["tree", "flow"])
def test_a_benchmark_that_is_killed_goes_on(
    place: Place, undisturbed: tuple[dict[str, bytes], float], killed: str, number: int
) -> None:
    """All its processes at once, or the flow's alone: what that one has started must end by itself."""
    results, seconds = undisturbed
    draw = random.Random(f"{SEED}/{killed}/{number}")
    fresh(place)
    finished: dict[str, tuple[int, bytes]] = {}
    for attempt in range(draw.randint(1, 3)):
        process = place.benchmark()
        # A later one goes on from what is finished.
        moment = draw.uniform(0.1, 0.9) * seconds / (1 + attempt)
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        # Servers that are warm by now may bring a benchmark to its end before its moment.
        fate = {None: "killed", 0: "done"}[process.returncode]
        print(f"round {number} (seed {SEED}), {killed}: {fate} after {moment:.1f} s")
        victims = tree(process.pid) if fate == "killed" else []
        kill(victims if killed == "tree" else victims[:1])
        process.wait()
        deadline = time.monotonic() + 15
        while place.orphans() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert place.orphans() == [], "the models of a killed benchmark live on"
        # What was finished in an earlier attempt must be the same to the end.
        assert {path: place.manifests().get(path) for path in finished} == finished
        finished = place.manifests()
    last = place.benchmark()
    assert last.wait(timeout=600) == 0, (place.folder / "log").read_text(encoding="utf-8", errors="replace")[-5000:]
    require_as_undisturbed(place, results, finished)


def submit(place: Place) -> str:
    """A run of the deployment; its id."""
    url = f"http://127.0.0.1:{place.ports()['prefect']}/api"
    query = {"parameters": {"models": list(MODELS)}, "state": {"type": "SCHEDULED"}}
    deadline = time.monotonic() + 60
    while True:
        try:
            found = httpx.get(f"{url}/deployments/name/benchmark/tiny", timeout=30).raise_for_status().json()
            path = f"{url}/deployments/{found['id']}/create_flow_run"
            return str(httpx.post(path, json=query, timeout=30).raise_for_status().json()["id"])
        except httpx.HTTPError:
            # As Prefect's own client: a database that is locked for the moment is answered with 503.
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def wait_until_at_work(place: Place, run: str, flow: str) -> None:
    """Wait until a benchmark, or one of its trainings, is running."""
    url = f"http://127.0.0.1:{place.ports()['prefect']}/api/flow_runs/filter"
    mine = {"id": {"any_": [run]}} if flow == "benchmark" else {"parent_flow_run_id": {"any_": [run]}}
    query = {"flow_runs": {**mine, "state": {"type": {"any_": ["RUNNING", "COMPLETED"]}}}}
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            answer = httpx.post(url, json=query, timeout=30)
            if answer.is_success and answer.json():
                return
        time.sleep(0.2)
    raise AssertionError(f"no {flow} is at work")


def ended(place: Place, run: str, seconds: float) -> str | None:
    """The state that a run ended in; None if it has not ended after some seconds."""
    url = f"http://127.0.0.1:{place.ports()['prefect']}/api/flow_runs/{run}"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            state = httpx.get(url, timeout=30).json()["state"]["type"]
            if state in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return str(state)
        time.sleep(0.5)
    return None


@pytest.mark.parametrize("number", range(ROUNDS))
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_deployments_run_survives_the_death_of_a_service(
    place: Place, undisturbed: tuple[dict[str, bytes], float], victim: str, number: int
) -> None:
    results, seconds = undisturbed
    draw = random.Random(f"{SEED}/{victim}/{number}")
    place.up()
    fresh(place)
    first = submit(place)
    wait_until_at_work(place, first, "train-fold" if victim == "worker-gpu" else "benchmark")
    moment = draw.uniform(0, 0.3 if victim == "worker-gpu" else 1.0) * seconds
    time.sleep(moment)
    kill(tree(place.services()[victim].pid))
    print(f"round {number} (seed {SEED}): {victim} killed after {moment:.1f} s")
    finished = place.manifests()
    place.up()
    became = ended(place, first, 30.0)
    print(f"round {number}: the run that was disturbed is {became or 'still said to run'}")
    # Whatever became of it, the next one must come to its end, and with it all that the first one left.
    second = submit(place)
    assert ended(place, second, 300.0) == "COMPLETED"
    require_as_undisturbed(place, results, finished)
