"""Leases of GPUs while flows are killed: never two holders of one, never one lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blocks.config.paths import PROJECT_ROOT
from blocks.local.gpus import list_holders
from tests.helpers.gpu_host import list_free, make_host
from tests.helpers.waiting import is_alive, wait_for

ROUNDS = int(os.environ.get("CALIPERT_FAULT_ROUNDS", "1"))
SEED = int(os.environ.get("CALIPERT_FAULT_SEED", "1"))


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A host with locks and data of the test's own and no GPU; call it to name some."""
    return make_host(tmp_path, monkeypatch)


# A model that claims its GPU for itself: by a lock of the test's own, which it holds until it is dead. Whoever finds
# the claim of a process that is alive, and not already on its way out, has been given a GPU that is in use.
CLAIMANT = """
import fcntl, json, os, pathlib, sys, time
spec = json.loads(pathlib.Path(sys.argv[2]).read_text())
device, folder = os.environ["CUDA_VISIBLE_DEVICES"], pathlib.Path(spec["folder"])
EXITING = 0x4

def note(what):
    os.write(log, f"{what} {device} {os.getpid()} {spec['flow']}\\n".encode())

def is_in_use(pid):
    try:
        flags = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[6])
    except (FileNotFoundError, ProcessLookupError):
        return False
    return not flags & EXITING

if spec["runs_away"]:
    os.setsid()
log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
claim = os.open(folder / device, os.O_RDWR | os.O_CREAT)
while True:
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
    except BlockingIOError:
        claimant = os.pread(claim, 20, 0)
        if claimant and is_in_use(int(claimant)):
            note("overlap")
            sys.exit(1)
    time.sleep(0.001)
os.pwrite(claim, b"%20d" % os.getpid(), 0)
note("begin")
# However slow the machine is, all GPUs are in use together once.
while len(list(folder.glob("GPU-fake-*"))) < 8:
    time.sleep(0.01)
time.sleep(spec["seconds"])
note("end")
"""


# Forks a process for each fold, as many at once as wait for each other; kills some; starts these again.
FLOWS = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
from blocks.engines.process import ProcessEngine
from blocks.local.gpus import lease_gpu

folder, model, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
FOLDS, AT_ONCE, KILLS = 40, 12, 40
draw = random.Random(seed)

def flow(fold, seconds):
    spec = {"folder": str(folder), "flow": os.getpid(), "seconds": seconds, "runs_away": fold % 4 == 0}
    with lease_gpu(f"fold {fold}") as gpu:
        ProcessEngine().run("train", model, spec, on_event=print, gpu=gpu)
    (folder / f"done {fold}").touch()

def forked(fold, seconds):
    pid = os.fork()
    if pid == 0:
        try:
            flow(fold, seconds)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def flows_that(what):
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    return {int(line.split()[3]) for line in lines if line.startswith(what)}

folds, waiting, running, kills, failed = FOLDS, list(range(FOLDS)), {}, 0, []
while waiting or running or kills < KILLS:
    if not waiting and kills < KILLS:
        # On a slow machine few flows are found while they train.
        waiting.append(folds)
        folds += 1
    while waiting and len(running) < AT_ONCE:
        fold = waiting.pop(0)
        running[forked(fold, draw.uniform(0.05, 0.5))] = fold
    if kills < KILLS and draw.random() < 0.3:
        training = flows_that("begin") - flows_that("end")
        candidates = [pid for pid in running if pid in training or draw.random() < 0.2]
        if candidates:
            os.kill(draw.choice(candidates), signal.SIGKILL)
            kills += 1
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            fold = running.pop(pid)
            if os.WIFSIGNALED(status):
                waiting.append(fold)
            elif status:
                failed.append(fold)
    time.sleep(0.02)
print(json.dumps({"folds": folds, "kills": kills, "failed": failed}))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of processes in /proc, as on Linux")
@pytest.mark.parametrize("seed", range(SEED, SEED + ROUNDS))
def test_eight_gpus_forty_folds_and_random_kills(host, tmp_path, seed):
    """No GPU has two models at any moment, none is lost, and every fold gets done.

    Only the flows are killed: their supervisors and models have to die of it. Every fourth model has left its group and
    lives on, on its GPU, after its flow is dead.
    """
    names = [f"GPU-fake-{number}" for number in range(8)]
    host(",".join(names))
    folder, model = tmp_path / "evidence", tmp_path / "toy"
    folder.mkdir()
    model.mkdir()
    (model / "model.py").write_text(CLAIMANT)
    flows = subprocess.run(
        [sys.executable, "-c", FLOWS, folder, model, str(seed)],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert flows.returncode == 0, flows.stderr
    assert wait_for(lambda: list_free() == names), (seed, list_holders())
    log = [line.split() for line in (folder / "log").read_text().splitlines()]
    overlaps = [line for line in log if line[0] == "overlap"]
    assert not overlaps, (seed, log)
    answer = json.loads(flows.stdout.splitlines()[-1])
    assert (answer["kills"], answer["failed"]) == (40, []), (seed, flows.stderr)
    assert {path.name for path in folder.glob("done *")} == {f"done {fold}" for fold in range(answer["folds"])}, seed
    begun = [line for line in log if line[0] == "begin"]
    assert {device for _, device, _, _ in begun} == set(names), seed
    assert wait_for(lambda: not any(is_alive(int(pid)) for _, _, pid, _ in log)), seed
    ended = sum(line[0] == "end" for line in log)
    print(f"seed {seed}: {answer['kills']} flows killed, {len(begun)} models begun, {len(begun) - ended} killed")
