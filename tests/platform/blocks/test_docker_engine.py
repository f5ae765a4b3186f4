"""The container engine: events, failures, and that nothing of a stage outlives the call that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import psutil
import pytest
from prefect_docker.host import DockerHost

from blocks.config.paths import PROJECT_ROOT
from blocks.engines.base import LAST_LINES, ModelFailed, Usage
from blocks.engines.docker import engine as docker_engine
from blocks.engines.docker.engine import DATA, GPU, OWNER, STAGE, DockerEngine
from blocks.engines.docker.limits import Limits
from blocks.local import cancellation
from blocks.local.cancellation import Stopped, stop_all
from blocks.local.gpus import lease_gpu, list_holders
from blocks.local.processes import name_this_process
from core.errors import UserError
from tests.helpers.waiting import wait_for

pytestmark = pytest.mark.usefixtures("nothing_left")

# A model that does what its spec says, in Python.
OBEDIENT = """
import json, os, pathlib, subprocess, sys, time
spec = json.loads(pathlib.Path(sys.argv[2]).read_text())
output = pathlib.Path(spec["output"])
exec(spec["code"])
"""
LIMITS = {"memory": 2**28, "output": 2**24, "output_files": 50, "temporary": 2**24, "shared_memory": 2**24}


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process where nothing was stopped yet."""
    monkeypatch.setattr(cancellation, "_STOPS", [])


@pytest.fixture(scope="module")
def model(docker_image: Callable[..., Path]) -> Path:
    return docker_image("obedient", OBEDIENT)


class Outcome:
    """What a run gave: its events, usage, and output folder."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.events: list[Mapping[str, Any]] = []
        self.usage: Usage

    @property
    def messages(self) -> list[str]:
        return [event["message"] for event in self.events]


def run(model: Path, tmp_path: Path, code: str, spec: Mapping[str, Any] | None = None, **options: Any) -> Outcome:
    """Have the model do what the code says. limits: those of the engine that differ from LIMITS."""
    limits = Limits(**(LIMITS | options.pop("limits", {})))
    outcome = Outcome(tmp_path / "output")
    outcome.output.mkdir(exist_ok=True)
    whole = {"code": dedent(code), "output": str(outcome.output)} | dict(spec or {})
    options = {"on_event": outcome.events.append} | options
    outcome.usage = DockerEngine(limits=limits).run("train", model, whole, **options)
    return outcome


def test_events_arrive_in_order_and_output_belongs_to_the_caller(model, tmp_path):
    code = """
        print(json.dumps({"event": "progress", "done": 1, "total": 2, "unit": "epoch"}))
        print("one\\rtwo", "x" * 3_000_000, sep="\\n")
        (output / "deep" / "er").mkdir(parents=True)
        (output / "deep" / "er" / "weights").write_bytes(bytes(3_000_000))
        (output / "text").write_text("é")
        os.chmod(output / "text", 0)
    """
    outcome = run(model, tmp_path, code)
    assert outcome.events[0] == {"event": "progress", "done": 1, "total": 2, "unit": "epoch"}
    messages = [event["message"] for event in outcome.events[1:]]
    assert messages[:2] == ["one", "two"]
    assert "".join(messages[2:]) == "x" * 3_000_000
    files = {path.relative_to(outcome.output).as_posix(): path for path in outcome.output.rglob("*")}
    assert set(files) == {"deep", "deep/er", "deep/er/weights", "text"}
    assert files["text"].read_text() == "é"
    assert files["deep/er/weights"].stat().st_size == 3_000_000
    assert {path.stat().st_uid for path in files.values()} == {os.geteuid()}


def test_the_spec_leads_to_the_inputs_and_they_cannot_be_written(model, tmp_path):
    cells, trained, pretrained = tmp_path / "train.h5ad", tmp_path / "model", tmp_path / "pretrained"
    cells.write_text("cells")
    trained.mkdir()
    pretrained.mkdir()
    (pretrained / "published").write_text("published")
    (trained / "weights").write_text("weights")
    (tmp_path / "test.h5ad").write_text("secret")
    code = """
        for path in (spec["cells"], spec["model"] + "/weights", spec["model"] + "/new", "/input/new", "/new"):
            try:
                pathlib.Path(path).write_text("changed")
            except OSError as error:
                print(type(error).__name__, error.strerror)
        print(pathlib.Path(spec["cells"]).read_text(), (pathlib.Path(spec["model"]) / "weights").read_text())
        print(sorted(os.listdir("/input")), spec["embedding"], spec["cells"], os.listdir(spec["pretrained"]))
    """
    given = {"cells": str(cells), "model": str(trained), "pretrained": str(pretrained), "embedding": None}
    outcome = run(model, tmp_path, code, given)
    assert outcome.messages[:5] == ["OSError Read-only file system"] * 5
    assert outcome.messages[5] == "cells weights"
    assert outcome.messages[6] == "['cells.h5ad', 'model', 'pretrained'] None /input/cells.h5ad ['published']"
    assert cells.read_text() == "cells"


def test_an_input_that_its_user_may_not_read_is_named(model, tmp_path, monkeypatch):
    cells = tmp_path / "train.h5ad"
    cells.write_text("cells")
    cells.chmod(0o600)
    if os.geteuid() != 0:
        pytest.skip("the container runs as the caller, who can read it")
    with pytest.raises(UserError, match=r"(?s)train\.h5ad.*cells.*may not read"):
        run(model, tmp_path, "", {"cells": str(cells)})


def test_what_a_model_is_and_may(model, tmp_path, monkeypatch):
    for name in ("PREFECT_API_KEY", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "secret")
    code = """
        print(os.getuid(), os.getgid(), os.getgroups())
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        print(*(status[name].strip() for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")))
        print(sorted(os.listdir("/sys/class/net")), os.environ["OMP_NUM_THREADS"], "secret" in os.environ.values())
        print(os.environ["CUDA_VISIBLE_DEVICES"] == "", os.environ["NVIDIA_VISIBLE_DEVICES"], os.getcwd())
        import resource
        print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE))
        pathlib.Path("/tmp/scratch").write_text("a model may write there")
        pathlib.Path("/dev/shm/scratch").write_text("and there")
        print(*sorted(path for path, _, _ in os.walk("/") if os.access(path, os.W_OK) and not path.startswith("/proc")))
    """
    uid = os.geteuid() or 65534
    outcome = run(model, tmp_path, code, {"threads": 2})
    assert outcome.messages[0].startswith(f"{uid} ")
    assert outcome.messages[1] == "0000000000000000 0000000000000000 1 2"
    assert outcome.messages[2] == "['lo'] 2 False"
    assert outcome.messages[3] == "True void /tmp"
    assert outcome.messages[4] == "(4096, 4096) (0, 0)"
    assert outcome.messages[5].split() == ["/dev/mqueue", "/dev/shm", "/output", "/tmp"]  # noqa: S108


def test_usage(model, tmp_path):
    code = """
        end = time.monotonic() + 2.5
        held = bytearray(100_000_000)
        while time.monotonic() < end:
            pass
    """
    usage = run(model, tmp_path, code).usage
    assert 2.4 < usage.seconds < 20
    assert usage.cpu_seconds is not None
    assert usage.peak_memory_bytes is not None
    assert 0.3 < usage.cpu_seconds <= usage.seconds * 1.2
    assert 1e8 < usage.peak_memory_bytes < 2**28
    assert usage.device == "cpu"


def test_an_error_shows_the_end_of_stderr_and_leaves_no_output(model, tmp_path):
    code = """
        (output / "half").write_text("half")
        for number in range(100):
            print("line", number, file=sys.stderr)
        sys.exit(3)
    """
    with pytest.raises(ModelFailed, match="obedient train ended with exit code 3") as caught:
        run(model, tmp_path, code)
    assert caught.value.last_lines == tuple(f"line {n}" for n in range(100 - LAST_LINES, 100))
    assert caught.value.exit_code == 3
    assert list((tmp_path / "output").iterdir()) == []


def test_a_signal_is_named(model, tmp_path):
    with pytest.raises(ModelFailed, match=r"was killed \(SIGSEGV\)") as caught:
        run(model, tmp_path, "os.kill(os.getpid(), 11)")
    assert caught.value.exit_code == -signal.SIGSEGV


@pytest.mark.parametrize("child", [False, True], ids=["the model", "a child of it"])
def test_too_much_memory(model, tmp_path, child):
    eat = "held = bytearray(400_000_000)"
    code = f"subprocess.run([sys.executable, '-c', {eat!r}])" if child else eat
    with pytest.raises(
        ModelFailed, match=r"ran out of memory, of which it may use 0\.25 GiB: to change it, set `memory`"
    ):
        run(model, tmp_path, code)


def test_too_long(model, tmp_path):
    began = time.monotonic()
    with pytest.raises(ModelFailed, match=r"was stopped after 2 s, its limit: to change it, set `time_limits"):
        run(model, tmp_path, "print('begun'); sys.stdout.close(); sys.stderr.close(); time.sleep(600)", timeout_s=2)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_printing_ends(model, tmp_path, stream):
    code = f"while True: print('y' * 1000, file=sys.{stream})"
    with pytest.raises(ModelFailed, match=r"after it had printed 4\.0MiB, its limit: to change it, set `printed`"):
        run(model, tmp_path, code, limits={"printed": 2**22})


def test_a_busy_reader_slows_the_model_and_nobody_keeps_what_it_prints(model, tmp_path, docker_client, nothing_left):
    """Of 200 MB it gets rid of a few: what stands in the pipes and queues on the way."""
    code = """
        print("begun", flush=True)
        for number in range(2000):
            pathlib.Path("/tmp/count").write_text(str(number))
            sys.stderr.write("y" * 99_999 + "\\n")
    """
    counts: list[int] = []

    def busy(event: Mapping[str, Any]) -> None:
        time.sleep(3)
        (name,) = (name for name in nothing_left() if name.startswith("/") and "keeper" not in name)
        counts.append(int(docker_client.containers.get(name[1:]).exec_run("cat /tmp/count").output))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, code, on_event=busy, limits={"printed": 2**30})
    assert 0 < counts[0] < 200


def test_a_full_output_is_explained(model, tmp_path):
    code = "(output / 'big').write_bytes(bytes(2**25))"
    with pytest.raises(
        ModelFailed, match=r"(?s)exit code 1; /output, /checkpoint and /tmp are limited: to change it, set `output`"
    ):
        run(model, tmp_path, code)


def test_silence_is_no_end(model, tmp_path, monkeypatch):
    """The client's own limit is for answers of the engine, not for what a model prints."""
    monkeypatch.setattr(docker_engine, "DockerHost", lambda: DockerHost(timeout=2))
    assert run(model, tmp_path, "time.sleep(5); print('late')").messages == ["late"]


def test_a_missing_image_names_the_remedy(docker_client, tmp_path):
    folder = tmp_path / "nowhere"
    folder.mkdir()
    for call in (DockerEngine().identity, DockerEngine().describe):
        with pytest.raises(UserError, match=r"(?s)calipert-nowhere.*calipert model build nowhere.*make images"):
            call(folder)


def test_identity_is_the_image(model, docker_client):
    assert DockerEngine().identity(model) == docker_client.images.get("calipert-obedient").id


def test_an_image_older_than_its_folder_is_refused(docker_image, docker_client):
    folder = docker_image("stale", "", "LABEL calipert.sources=other")
    with pytest.raises(UserError, match=r"(?s)calipert-stale.*before .* was last changed.*calipert model build stale"):
        DockerEngine().identity(folder)


def test_an_image_with_volumes_of_its_own_is_refused(docker_image):
    folder = docker_image("hoarder", "", "VOLUME /hoard")
    with pytest.raises(UserError, match=r"(?s)VOLUME.*/hoard"):
        DockerEngine().identity(folder)


def test_describe(docker_image):
    text = """
import json, sys
no = dict.fromkeys(["combinations", "embedding", "counts", "gpu"], False)
output = json.load(open(sys.argv[2]))["output"]
open(output + "/describe.json", "w").write(json.dumps(no | {"name": "dumb", "input": "cells"}))
"""
    assert DockerEngine().describe(docker_image("dumb", text)).input == "cells"


def test_no_engine_is_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(UserError, match=r"(?s)Docker.*no answer.*systemctl start docker.*CALIPERT_ENGINE=process"):
        DockerEngine().identity(tmp_path)


def test_a_gpu_without_its_runtime_is_explained(model, tmp_path, monkeypatch, docker_client):
    if "nvidia" in docker_client.info()["Runtimes"]:
        pytest.skip("this machine has the runtime")
    monkeypatch.setenv("CALIPERT_GPUS", "GPU-none-of-this-machine")
    monkeypatch.setenv("CALIPERT_LOCKS", str(tmp_path / "locks"))
    with lease_gpu("test") as gpu, pytest.raises(UserError, match=r"(?s)GPU-none.*NVIDIA container toolkit"):
        run(model, tmp_path, "", gpu=gpu)


def test_a_gpu_that_a_stranger_still_uses_is_refused(model, tmp_path, monkeypatch, docker_client, base_image):
    monkeypatch.setenv("CALIPERT_GPUS", "GPU-0")
    monkeypatch.setenv("CALIPERT_LOCKS", str(tmp_path / "locks"))
    stranger = docker_client.containers.run(
        base_image, ["sleep", "600"], detach=True, name="calipert-test-stranger", labels={GPU: "GPU-0"}, init=True
    )
    try:
        with lease_gpu("test") as gpu, pytest.raises(ModelFailed, match="container calipert-test-stranger uses it"):
            run(model, tmp_path, "", gpu=gpu)
    finally:
        stranger.remove(force=True)


def test_an_exception_in_the_caller_ends_the_container(model, tmp_path):
    def refuse(event: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, "print('begun', flush=True); time.sleep(600)", on_event=refuse)


def test_a_stop_ends_the_container_within_seconds(model, tmp_path, nothing_left):
    begun = threading.Event()
    ended: list[BaseException] = []

    def stopped() -> None:
        try:
            run(model, tmp_path, "print('begun', flush=True); time.sleep(600)", on_event=lambda _: begun.set())
        except Stopped as error:
            ended.append(error)

    thread = threading.Thread(target=stopped)
    thread.start()
    assert begun.wait(60)
    began = time.monotonic()
    stop_all("cancelled")
    assert wait_for(lambda: nothing_left() == [], 10)
    thread.join(20)
    assert "cancelled" in str(ended[0])
    assert time.monotonic() - began < 10
    with pytest.raises(Stopped):
        run(model, tmp_path, "")


CALLER = """
import os, sys
from pathlib import Path
from blocks.local import gpus
from blocks.engines.docker.engine import DockerEngine
def begun(event):
    Path({begun!r}).write_text("begun")
code = "print('begun', flush=True); time.sleep(600)"
with gpus.lease_gpu("test") as gpu:
    # The lease is what matters, and there is no GPU to hand to the container.
    from blocks.engines.docker import stage as docker_stage
    from blocks.engines.docker import engine as docker_engine
    options = docker_engine.model_options
    docker_engine.model_options = lambda *given: options(*given) | {{"device_requests": []}}
    spec = {{"output": {output!r}, "code": code}}
    DockerEngine().run("train", Path({model!r}), spec, on_event=begun, gpu=gpu)
"""


@pytest.fixture
def caller(model, tmp_path, monkeypatch) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that leases a GPU and runs a model which sleeps."""
    monkeypatch.setenv("CALIPERT_GPUS", "GPU-0")
    monkeypatch.setenv("CALIPERT_LOCKS", str(tmp_path / "locks"))
    script = CALLER.format(begun=str(tmp_path / "begun"), output=str(tmp_path / "output"), model=str(model))
    (tmp_path / "output").mkdir()
    with subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            assert wait_for((tmp_path / "begun").exists, 60)
            yield process
        finally:
            process.kill()


def guard_of(pid: int) -> int:
    (guard,) = (child for child in psutil.Process(pid).children() if "docker/guard.py" in " ".join(child.cmdline()))
    return int(guard.pid)


def test_killing_the_caller_ends_the_container_and_the_gpu_is_leased_until_then(caller, tmp_path, nothing_left, model):
    guard = guard_of(caller.pid)
    os.kill(guard, signal.SIGSTOP)
    caller.kill()
    caller.wait()
    assert list_holders()[0][1] is not None, "the container still runs"
    assert len(nothing_left()) == 3
    os.kill(guard, signal.SIGCONT)
    assert wait_for(lambda: nothing_left() == [], 20)
    assert wait_for(lambda: list_holders()[0][1] is None, 30)
    run(model, tmp_path, "")  # which sweeps its scratch folder


def test_the_next_stage_removes_what_a_caller_and_its_guard_left_and_nothing_else(
    caller, tmp_path, docker_client, nothing_left, model, caplog
):
    strangers = {
        "living": {OWNER: name_this_process(), DATA: str(tmp_path / "data")},
        "elsewhere": {OWNER: "machine 1 1.0", DATA: str(tmp_path / "other")},
        "unknown": {OWNER: "another-machine 1 1.0", DATA: str(tmp_path / "data")},
    }
    volumes = [
        docker_client.volumes.create(f"test-{name}", labels=labels | {STAGE: name})
        for name, labels in strangers.items()
    ]
    try:
        run(model, tmp_path, "")
        assert len(nothing_left()) == 5, "a living one's stay"
        os.kill(guard_of(caller.pid), signal.SIGKILL)
        caller.kill()
        caller.wait()
        assert len(nothing_left()) == 5
        run(model, tmp_path, "")
        assert sorted(nothing_left()) == ["test-living", "test-unknown"]
        assert docker_client.volumes.get("test-elsewhere")
        assert "a killed process left" in caplog.text
    finally:
        for volume in volumes:
            volume.remove()


def test_a_killed_guard_ends_the_stage(model, tmp_path):
    with pytest.raises(ModelFailed, match="the process that guards its container was killed"):
        run(
            model,
            tmp_path,
            "print('begun', flush=True); time.sleep(600)",
            on_event=lambda _: os.kill(guard_of(os.getpid()), signal.SIGKILL),
        )
