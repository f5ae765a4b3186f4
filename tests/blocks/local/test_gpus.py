"""Leases of GPUs: never two holders of one, never one lost, whoever is killed. The GPUs are names (CALIPERT_GPUS)."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import pytest

from blocks.engines.lines import Event
from blocks.engines.process import ProcessEngine
from blocks.local import gpus
from blocks.local.cancellation import Stopped, stop_all
from blocks.local.gpus import Holder, lease_gpu, list_gpus, list_holders, open_lock_folder
from core.errors import UserError
from tests.helpers.gpu_host import list_free, make_host
from tests.helpers.waiting import is_alive, wait_for

ROOT = Path(__file__).resolve().parents[3]

WHOLE = "GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f"
DIVIDED = "GPU-932bfb2c-849a-2a22-1e84-9eff6bc02b39"
PARTS = ["MIG-0929581a-2be6-5dec-bf34-0954c6c529a6", "MIG-3adbed3a-d03d-549f-a016-ba1fd7359f23"]
LISTED = f"""\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: {WHOLE})
GPU 1: NVIDIA A100 80GB PCIe (UUID: {DIVIDED})
  MIG 3g.40gb     Device  0: (UUID: {PARTS[0]})
  MIG 3g.40gb     Device  1: (UUID: {PARTS[1]})
"""


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A host with locks and data of the test's own and no GPU; call it to name some."""
    return make_host(tmp_path, monkeypatch)


# ---- which GPUs there are


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Puts an nvidia-smi that prints a text and ends with an exit status in the place of all others."""
    monkeypatch.delenv(gpus.GPUS)
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(text: str, status: int = 0) -> None:
        (tmp_path / "listed").write_text(text)
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n[ $1 = -L ] && /bin/cat '{tmp_path / 'listed'}'\nexit {status}\n")
        tool.chmod(0o755)

    return install


def test_without_nvidia_smi_there_is_no_gpu(nvidia_smi):
    assert list_gpus() == []
    assert list_holders() == []


@pytest.mark.parametrize(
    ("chosen", "visible", "expected"),
    [
        (None, None, [WHOLE, *PARTS]),
        (None, "0", [WHOLE]),
        (None, "1", PARTS),
        (None, f"{PARTS[1]}, {WHOLE[:10]}", [WHOLE, PARTS[1]]),
        (None, "0,7,1", [WHOLE]),
        (None, "GPU-,1", []),
        (None, "", []),
        (None, "-1", []),
        (None, "NoDevFiles", []),
        ("", None, []),
        ("none", "0", []),
        ("0", None, [WHOLE]),
        (f"0, {WHOLE}", None, [WHOLE]),
        ("1", PARTS[0], [PARTS[0]]),
    ],
)
def test_devices(nvidia_smi, monkeypatch, chosen, visible, expected):
    nvidia_smi(LISTED)
    for name, value in ((gpus.GPUS, chosen), (gpus.VISIBLE, visible)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert list_gpus() == expected


@pytest.mark.parametrize("listed", [LISTED, None])
@pytest.mark.parametrize("chosen", ["abc", "0,gpu1"])
def test_what_is_no_gpu_is_refused(nvidia_smi, monkeypatch, listed, chosen):
    if listed:
        nvidia_smi(listed)
    monkeypatch.setenv(gpus.GPUS, chosen)
    with pytest.raises(UserError, match="not a GPU of this host"):
        list_gpus()


def test_a_number_that_nvidia_smi_does_not_list_is_refused(nvidia_smi, monkeypatch):
    nvidia_smi(LISTED)
    monkeypatch.setenv(gpus.GPUS, "0,7")
    with pytest.raises(UserError) as caught:
        list_gpus()
    assert caught.value.found.startswith("'7'")


def test_numbers_are_names_where_nvidia_smi_is_absent(host, monkeypatch):
    host("0,1,2")
    monkeypatch.setenv(gpus.VISIBLE, "2,0")
    assert list_gpus() == ["0", "2"]


@pytest.mark.parametrize("status", [0, 6])
def test_nvidia_smi_that_finds_none(nvidia_smi, status):
    nvidia_smi("No devices found.\n", status)
    assert list_gpus() == []


@pytest.mark.parametrize(
    ("text", "status"), [("Failed to initialize NVML: Driver/library version mismatch\n", 18), ("", 0)]
)
def test_nvidia_smi_that_fails_is_no_host_without_gpu(nvidia_smi, text, status):
    nvidia_smi(text, status)
    with pytest.raises(UserError, match=r"(?s)CALIPERT_GPUS=none") as caught:
        list_gpus()
    assert text.strip() in caught.value.found


def test_a_lost_gpu_does_not_hide_the_others(nvidia_smi, caplog):
    nvidia_smi(f"{LISTED}Unable to determine the device handle for GPU2: GPU is lost\n", 15)
    assert list_gpus() == [WHOLE, *PARTS]
    assert "GPU is lost" in caplog.text


# ---- leases


def test_a_host_without_gpu_trains_on_the_cpu_and_says_so_once(caplog):
    caplog.set_level(logging.INFO, "calipert")
    with lease_gpu("ridge, fold 3") as gpu:
        assert gpu is None
    assert caplog.messages == ["ridge, fold 3 runs on the CPU: no GPU is to be used here (CALIPERT_GPUS=none)"]
    assert list(open_lock_folder().iterdir()) == []


def test_a_lease_takes_the_first_free_gpu_and_gives_it_back(host):
    host("GPU-a,GPU-b")
    with lease_gpu("one") as first:
        with lease_gpu("two") as second:
            assert first is not None
            assert second is not None
            assert [first.id, second.id] == ["GPU-a", "GPU-b"]
            assert list_holders() == [("GPU-a", Holder(os.getpid(), "one")), ("GPU-b", Holder(os.getpid(), "two"))]
        assert list_free() == ["GPU-b"]
    assert list_free() == ["GPU-a", "GPU-b"]


def test_an_error_gives_the_gpu_back(host):
    host("GPU-a")
    with pytest.raises(KeyboardInterrupt), lease_gpu("one"):
        raise KeyboardInterrupt
    assert list_free() == ["GPU-a"]


def test_a_longer_name_of_an_earlier_holder_leaves_nothing(host):
    host("GPU-a")
    for name in ("a name that is rather long", "short", "Schrödinger\n2"):
        with lease_gpu(name):
            assert list_holders() == [("GPU-a", Holder(os.getpid(), name))]


def test_a_gpu_whose_holder_has_not_written_yet_is_held(host):
    host("GPU-a")
    with lease_gpu("one") as gpu:
        assert gpu is not None
        os.ftruncate(gpu.descriptor, 0)
        assert list_holders() == [("GPU-a", Holder(None, "has just taken it"))]


def test_who_waits_says_so_once_and_takes_what_comes_free(host, caplog, monkeypatch):
    host("GPU-a,GPU-b")
    caplog.set_level(logging.INFO, "calipert")
    polls = []
    with ExitStack() as one, ExitStack() as two:
        one.enter_context(lease_gpu("one"))
        two.enter_context(lease_gpu("two"))

        def sleep(seconds: float) -> None:
            polls.append(seconds)
            if len(polls) == 3:
                two.close()

        monkeypatch.setattr(gpus, "time", SimpleNamespace(sleep=sleep))
        with lease_gpu("three") as gpu:
            assert gpu is not None
            assert gpu.id == "GPU-b"
    assert polls == [gpus.POLL_S] * 3
    assert [message for message in caplog.messages if "three" in message] == [
        "three waits: all 2 GPUs are busy",
        "three has GPU GPU-b",
    ]


def test_who_waits_is_ended_by_a_stop(host, monkeypatch):
    host("GPU-a")
    monkeypatch.setattr(gpus, "time", SimpleNamespace(sleep=lambda seconds: stop_all("cancelled")))
    with lease_gpu("one"), pytest.raises(Stopped, match="two was stopped: cancelled"), lease_gpu("two"):
        pass
    with pytest.raises(Stopped), lease_gpu("three"):
        pass
    assert list_free() == ["GPU-a"]


def test_threads_of_one_process_exclude_each_other(host):
    host("GPU-a,GPU-b")
    guard, held, seen = threading.Lock(), set(), []

    def use(number: int) -> bool:
        with lease_gpu(f"thread {number}") as gpu:
            assert gpu is not None
            with guard:
                alone = gpu.id not in held
                held.add(gpu.id)
                seen.append(gpu.id)
            time.sleep(0.02)
            with guard:
                held.discard(gpu.id)
            return alone

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(8)))
    assert set(seen) == {"GPU-a", "GPU-b"}
    assert list_free() == ["GPU-a", "GPU-b"]


def test_locks_are_for_all_users_whatever_the_umask(host, tmp_path):
    host("GPU-a,MIG-GPU-1/2/0")
    before = os.umask(0o077)
    try:
        with lease_gpu("one"), lease_gpu("two"):
            pass
    finally:
        os.umask(before)
    assert sorted(path.name for path in (tmp_path / "locks").iterdir()) == ["GPU-a.lock", "MIG-GPU-1%2F2%2F0.lock"]
    assert stat.S_IMODE((tmp_path / "locks").stat().st_mode) == gpus.FOLDER_MODE
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "locks").iterdir()} == {gpus.FILE_MODE}


def test_a_link_is_no_lock(host, tmp_path):
    host("GPU-a")
    (tmp_path / "precious").write_text("text")
    (open_lock_folder() / "GPU-a.lock").symlink_to(tmp_path / "precious")
    for use in (lambda: lease_gpu("one").__enter__(), list_holders):
        with pytest.raises(UserError, match=r"a\.lock"):
            use()
    assert (tmp_path / "precious").read_text() == "text"


def test_a_pipe_is_no_lock(host):
    host("GPU-a")
    os.mkfifo(open_lock_folder() / "GPU-a.lock")
    with pytest.raises(UserError, match=r"a\.lock"), lease_gpu("one"):
        pass


def test_a_folder_of_locks_that_cannot_be_used(host, tmp_path, monkeypatch):
    host("GPU-a")
    (tmp_path / "file").touch()
    monkeypatch.setenv(gpus.LOCKS, str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"(?s)file.*CALIPERT_LOCKS"), lease_gpu("one"):
        pass
    monkeypatch.setenv(gpus.LOCKS, str(tmp_path / "missing" / "locks"))
    with pytest.raises(UserError, match=r"(?s)missing.*CALIPERT_LOCKS"), lease_gpu("one"):
        pass


def test_the_shared_folder_is_the_first_that_can_be_made(host, tmp_path, monkeypatch):
    monkeypatch.delenv(gpus.LOCKS)
    first, second = tmp_path / "run" / "gpus", tmp_path / "gpus"
    monkeypatch.setattr(gpus, "SHARED_FOLDERS", (first, second))
    assert open_lock_folder() == second
    first.parent.mkdir()
    assert open_lock_folder() == first
    first.rmdir()
    first.symlink_to(second)
    with pytest.raises(UserError, match="run/gpus"):
        open_lock_folder()


def test_a_lock_file_that_is_deleted_while_it_is_taken_is_no_lease(host, monkeypatch):
    host("GPU-a")
    real = fcntl.flock
    removed: list[bool] = []

    def flock(file: int, how: int) -> None:
        real(file, how)
        if not removed:
            removed.append(True)
            (open_lock_folder() / "GPU-a.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with lease_gpu("one") as gpu:
        assert gpu is not None
        assert os.path.samestat(os.fstat(gpu.descriptor), (open_lock_folder() / "GPU-a.lock").stat())
        assert list_holders() == [("GPU-a", Holder(os.getpid(), "one"))]


# ---- deaths


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a Python program in the project's folder; kills it at the end."""
    started = []

    def begin(program: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", dedent(program)], cwd=ROOT))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_a_fork_of_a_killed_holder_does_not_keep_the_gpu(host, tmp_path, start):
    host("GPU-a")
    holder = start(f"""
        import os, time
        from pathlib import Path
        from blocks.local.gpus import lease_gpu
        with lease_gpu("one"):
            child = os.fork()
            if child == 0:
                time.sleep(600)
            Path({str(tmp_path / "part")!r}).write_text(str(child))
            Path({str(tmp_path / "part")!r}).rename({str(tmp_path / "child")!r})
            time.sleep(600)
    """)
    assert wait_for((tmp_path / "child").exists)
    child = int((tmp_path / "child").read_text())
    try:
        assert list_holders() == [("GPU-a", Holder(holder.pid, "one"))]
        holder.kill()
        holder.wait()
        assert wait_for(lambda: list_free() == ["GPU-a"])
        assert is_alive(child)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.fixture
def runaway(tmp_path: Path) -> Path:
    """The folder of a model that leaves its group, writes its and its supervisor's process id to `pids`, and sleeps."""
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "model.py").write_text(f"""
import os, pathlib, time
supervisor = os.getppid()
os.setsid()
pathlib.Path({str(tmp_path / "part")!r}).write_text(f"{{os.getpid()}} {{supervisor}}")
pathlib.Path({str(tmp_path / "part")!r}).rename({str(tmp_path / "pids")!r})
print("away", flush=True)
time.sleep(600)
""")
    return folder


def test_a_model_that_left_its_group_keeps_its_gpu_until_it_is_dead(host, tmp_path, runaway, start):
    """Killing the flow ends its supervisor and what is in its group. Who ran away still uses the GPU."""
    host("GPU-a")
    flow = start(f"""
        from pathlib import Path
        from blocks.engines.process import ProcessEngine
        from blocks.local.gpus import lease_gpu
        with lease_gpu("one") as gpu:
            ProcessEngine().run("train", Path({str(runaway)!r}), {{}}, on_event=print, gpu=gpu)
    """)
    assert wait_for((tmp_path / "pids").exists)
    model, supervisor = map(int, (tmp_path / "pids").read_text().split())
    try:
        flow.kill()
        flow.wait()
        assert wait_for(lambda: not is_alive(supervisor))
        assert is_alive(model)
        assert list_holders() == [("GPU-a", Holder(flow.pid, "one"))]
    finally:
        os.kill(model, signal.SIGKILL)
    assert wait_for(lambda: list_free() == ["GPU-a"])


def test_a_lease_that_ends_before_its_model_does_not_free_the_gpu(host, tmp_path, runaway):
    host("GPU-a")

    def refuse(event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lease_gpu("one") as gpu:
        ProcessEngine().run("train", runaway, {}, on_event=refuse, gpu=gpu)
    model, supervisor = map(int, (tmp_path / "pids").read_text().split())
    try:
        assert not is_alive(supervisor)
        assert is_alive(model)
        assert list_free() == []
    finally:
        os.kill(model, signal.SIGKILL)
    assert wait_for(lambda: list_free() == ["GPU-a"])


# ---- a real one


@pytest.mark.gpu
def test_a_model_sees_the_leased_gpu_and_no_other(tmp_path, monkeypatch):
    if shutil.which("nvidia-smi") is None:
        pytest.skip("nvidia-smi is not installed")
    monkeypatch.delenv(gpus.GPUS)
    if not list_gpus():
        pytest.skip("nvidia-smi lists no GPU")
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "model.py").write_text(
        "import contract, torch\n"
        "count = torch.cuda.device_count()\n"
        "total = torch.ones(3, device='cuda').sum().item() if count else 0\n"
        "contract.metric('devices', 1, count)\n"
        "contract.metric('total', 1, total)\n"
    )

    def found(gpu: gpus.Gpu | None) -> list[float]:
        events: list[Event] = []
        ProcessEngine().run("train", folder, {}, on_event=events.append, gpu=gpu)
        return [event["value"] for event in events]

    with lease_gpu("one") as gpu:
        assert gpu is not None
        assert found(gpu) == [1.0, 3.0]
        assert found(None) == [0.0, 0.0]
