"""The process engine: events, failures, and that no process of a model outlives the call that started it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextvars import Context, copy_context
from pathlib import Path
from textwrap import dedent
from typing import Any

import psutil
import pytest

from blocks.config.paths import scratch_folder
from blocks.engines import base, sources
from blocks.engines import process as engines
from blocks.engines.base import LAST_LINES, ModelFailed, Usage
from blocks.engines.process import ProcessEngine
from blocks.local import cancellation
from blocks.local.cancellation import Stopped, end_models_with, stop_all
from blocks.local.gpus import lease_gpu
from core.errors import UserError
from tests.helpers.waiting import is_alive, wait_for

ROOT = Path(__file__).resolve().parents[3]

# A model with a child of its own: both write their process ids into `output`, then sleep.
SLEEPER = """
import json, os, pathlib, subprocess, sys, time
output = pathlib.Path(json.loads(pathlib.Path(sys.argv[2]).read_text())["output"])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(output / "part").write_text(f"{os.getpid()} {child.pid}")
(output / "part").rename(output / "pids")
print("asleep", flush=True)
"""


@pytest.fixture(autouse=True)
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data folder of the test's own, in a process where nothing was stopped yet."""
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(cancellation, "_STOPS", [])


@pytest.fixture
def model(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a model's folder from the text of its model.py."""

    def make(text: str) -> Path:
        folder = tmp_path / "elsewhere" / "toy"
        folder.mkdir(parents=True)
        (folder / "model.py").write_text(dedent(text))
        return folder

    return make


def run(folder: Path, spec: Mapping[str, Any] | None = None, **options: Any) -> list[Mapping[str, Any]]:
    events: list[Mapping[str, Any]] = []
    ProcessEngine().run("train", folder, spec or {}, **({"on_event": events.append} | options))
    return events


def pids_in(folder: Path) -> list[int]:
    assert wait_for((folder / "pids").exists)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def all_gone(folder: Path) -> bool:
    return wait_for(lambda: not any(is_alive(pid) for pid in pids_in(folder)))


def test_events_come_in_order_and_other_lines_are_logged(model):
    folder = model("""
        import sys
        print('{"event": "progress", "done": 1, "total": 2, "unit": "epoch"}')
        print('{"event": "metric", "name": "val_loss", "step": 1, "value": NaN}')
        print("free text")
        print('{"event": "progress", "done": "one"}')
        print('{"event": "log", "message": "Schrödinger"}', end="")
    """)
    progress, metric, *logs = run(folder)
    assert progress == {"event": "progress", "done": 1, "total": 2, "unit": "epoch"}
    assert metric["value"] != metric["value"]
    assert [event["message"] for event in logs] == ["free text", '{"event": "progress", "done": "one"}', "Schrödinger"]
    assert {event["event"] for event in logs} == {"log"}


def test_events_come_while_the_model_runs(model, tmp_path):
    folder = model("""
        import json, pathlib, sys, time
        answer = pathlib.Path(json.loads(pathlib.Path(sys.argv[2]).read_text())["answer"])
        print("question", flush=True)
        while not answer.exists():
            time.sleep(0.01)
    """)
    answer = tmp_path / "answer"
    run(folder, {"answer": str(answer)}, on_event=lambda event: answer.touch(), timeout_s=60)


def test_a_long_output_without_newline_is_not_lost(model):
    folder = model("print('x' * 3_000_000, end='')")
    assert sum(len(event["message"]) for event in run(folder)) == 3_000_000


def test_failure_names_model_stage_exit_code_and_last_lines(model):
    folder = model(f"""
        import sys
        for line in range({LAST_LINES + 5}):
            print("line", line, file=sys.stderr)
        sys.exit(3)
    """)
    with pytest.raises(ModelFailed) as caught:
        run(folder)
    assert str(caught.value).splitlines()[0] == "toy train ended with exit code 3"
    assert caught.value.exit_code == 3
    assert caught.value.last_lines == tuple(f"line {line}" for line in range(5, LAST_LINES + 5))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


def test_a_failure_survives_pickling_however_it_was_made():
    made = ModelFailed(model="toy", stage="train", ending="ended", exit_code=None, last_lines=("a", "b"))
    found = pickle.loads(pickle.dumps(made))  # noqa: S301
    assert (vars(found), found.args, str(found)) == (vars(made), made.args, "toy train ended\n  a\n  b")


def test_a_killed_model_is_told_from_one_that_exits(model):
    folder = model("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ModelFailed, match=r"SIGKILL.*memory") as caught:
        run(folder)
    assert caught.value.exit_code == -signal.SIGKILL


def test_timeout_ends_the_whole_process_tree(model, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(base, "monotonic", lambda: clock[0])

    def two_hours_later(event: Mapping[str, Any]) -> None:
        clock[0] += 7200

    folder = model(SLEEPER + "time.sleep(600)")
    with pytest.raises(
        ModelFailed, match=r"toy train was stopped after 3600 s, its limit: .*`time_limits: {train: SEC"
    ):
        run(folder, {"output": str(tmp_path)}, on_event=two_hours_later, timeout_s=3600)
    assert all_gone(tmp_path)


def test_no_line_is_passed_on_after_the_limit(model, monkeypatch):
    clock, passed = [0.0], []
    monkeypatch.setattr(base, "monotonic", lambda: clock[0])

    def two_hours_later(event: Mapping[str, Any]) -> None:
        clock[0] += 7200
        passed.append(event["message"])

    with pytest.raises(ModelFailed, match="was stopped after 3600 s"):
        run(model("import os; os.write(1, b'one\\ntwo\\n')"), on_event=two_hours_later, timeout_s=3600)
    assert passed == ["one"]


def test_a_model_that_says_nothing_is_stopped_at_its_limit(model):
    folder = model("import time; time.sleep(600)")
    with pytest.raises(ModelFailed, match=r"toy train was stopped after 0\.1 s, its limit") as caught:
        run(folder, timeout_s=0.1)
    assert caught.value.exit_code is None


def test_the_limit_of_describe_is_no_setting(model, monkeypatch):
    monkeypatch.setattr(ProcessEngine, "describe_limit_s", 0.1)
    folder = model("import time; time.sleep(600)")
    with pytest.raises(ModelFailed, match=r"toy describe was stopped after 0\.1 s, its limit: a model has to describe"):
        ProcessEngine().describe(folder)


def test_a_timeout_of_the_caller_is_not_the_models(model):
    def refuse(event: Mapping[str, Any]) -> None:
        raise TimeoutError("the server does not answer")

    with pytest.raises(TimeoutError, match="server"):
        run(model("print('a')"), on_event=refuse, timeout_s=60)


def test_a_python_that_is_not_there_is_no_lack_of_memory(model):
    with pytest.raises(ModelFailed, match=r"ended with exit code 1") as caught:
        ProcessEngine(python="/nowhere/python").run("train", model(""), {}, on_event=print)
    assert "/nowhere/python" in caught.value.last_lines[-1]


def test_usage_tells_time_processor_and_memory(model):
    """The memory is touched, the processor is kept busy in a child: what the model waits for counts as its own."""
    usage = ProcessEngine().run(
        "train",
        model("""
        import os, subprocess, sys, time
        block = b"x" * 200_000_000
        burn = "import time\\nwhile time.process_time() < 0.4: pass"
        subprocess.run([sys.executable, "-c", burn], check=True)
        time.sleep(0.2)
    """),
        {},
        on_event=print,
    )
    assert usage.seconds >= 0.6
    assert usage.cpu_seconds is not None
    assert usage.peak_memory_bytes is not None
    assert usage.cpu_seconds >= 0.4
    assert 200e6 <= usage.peak_memory_bytes < 400e6


def test_usage_is_the_models_not_the_callers(model):
    """A process that was forked from a large one would count the large one's memory as its own."""
    ballast = b"x" * 300_000_000
    usage = ProcessEngine().run("train", model(""), {}, on_event=print)
    assert isinstance(usage, Usage)
    assert usage.peak_memory_bytes is not None
    assert 1e6 < usage.peak_memory_bytes < 100e6 < len(ballast)


def test_a_model_sees_its_gpu_alone(model, monkeypatch):
    folder = model("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    monkeypatch.setenv("CALIPERT_GPUS", "GPU-0,GPU-1,GPU-2")
    monkeypatch.setenv("CALIPERT_LOCKS", str(folder))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-2")
    with lease_gpu("one") as gpu:
        assert [event["message"] for event in run(folder, gpu=gpu)] == ["GPU-1"]


def test_without_a_lease_a_model_sees_no_gpu(model, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    folder = model("import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))")
    assert [event["message"] for event in run(folder)] == ["''"]


class Running:
    """A model that sleeps, in a thread of its own with a copy of this context; `error` is what ended it."""

    def __init__(self, folder: Path, output: Path, on_event: Callable[[Mapping[str, Any]], None] = print) -> None:
        self.error: BaseException | None = None
        self.output = output
        self.output.mkdir()
        context = copy_context()
        self.thread = threading.Thread(target=lambda: context.run(self._run, folder, on_event), daemon=True)
        self.thread.start()
        pids_in(output)

    def _run(self, folder: Path, on_event: Callable[[Mapping[str, Any]], None]) -> None:
        try:
            run(folder, {"output": str(self.output)}, on_event=on_event)
        except BaseException as error:  # noqa: BLE001
            self.error = error

    def ended(self) -> BaseException | None:
        """What ended it, after its end. A model sleeps ten minutes: nothing but a stop ends it before the wait does."""
        self.thread.join(60)
        assert not self.thread.is_alive()
        assert all_gone(self.output)
        return self.error


def test_stop_all_ends_models_in_all_threads_and_those_that_would_begin(model, tmp_path):
    folder = model(SLEEPER + "time.sleep(600)")
    running = [Running(folder, tmp_path / str(number)) for number in range(2)]
    stop_all("the flow run was cancelled")
    for one in running:
        assert isinstance(error := one.ended(), Stopped)
        assert str(error) == "toy train was stopped: the flow run was cancelled"
        assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301
    with pytest.raises(Stopped, match="cancelled"):
        run(folder, {"output": str(tmp_path)})
    assert not (tmp_path / "pids").exists(), "it did not even start"
    assert list(scratch_folder().iterdir()) == []


def test_stop_all_does_not_wait_for_the_thread_of_a_model(model, tmp_path):
    """The thread may hang in the middle of telling somebody about an event."""
    hanging, released = threading.Event(), threading.Event()

    def hang(event: Mapping[str, Any]) -> None:
        hanging.set()
        released.wait()

    one = Running(model(SLEEPER + "time.sleep(600)"), tmp_path / "one", on_event=hang)
    try:
        assert hanging.wait(60)
        stop_all("cancelled")
        assert all_gone(tmp_path / "one")
    finally:
        released.set()
    assert isinstance(one.ended(), Stopped)


def test_stop_all_may_be_called_by_a_signal_handler_of_the_thread_that_runs_the_model(model, tmp_path):
    before = signal.signal(signal.SIGUSR1, lambda *_: stop_all("SIGUSR1"))
    try:
        with pytest.raises(Stopped, match="SIGUSR1"):
            run(
                model(SLEEPER + "time.sleep(600)"),
                {"output": str(tmp_path)},
                on_event=lambda event: signal.raise_signal(signal.SIGUSR1),
            )
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert all_gone(tmp_path)


def test_models_end_with_the_error_of_their_flow_and_no_others(model, tmp_path):
    folder = model(SLEEPER + "time.sleep(600)")
    late: list[Context] = []
    with end_models_with("another flow"):
        other = Running(folder, tmp_path / "other")

    def flow() -> None:
        with end_models_with("the benchmark of norman19"), end_models_with("an inner flow"):
            late.append(copy_context())
            Running(folder, tmp_path / "one", on_event=lambda event: None)
            running.append(Running(folder, tmp_path / "two"))
            raise KeyboardInterrupt

    running: list[Running] = []
    with pytest.raises(KeyboardInterrupt):
        flow()
    assert "an inner flow ended with KeyboardInterrupt" in str(running[0].ended())
    assert all_gone(tmp_path / "one")
    with pytest.raises(Stopped, match="an inner flow"):
        late[0].run(run, folder, {"output": str(tmp_path)})
    assert other.error is None
    assert is_alive(pids_in(tmp_path / "other")[0])
    stop_all("the end of the test")
    assert isinstance(other.ended(), Stopped)


def test_the_end_of_an_outer_flow_ends_the_models_of_an_inner_one_that_went_well(model, tmp_path):
    folder = model(SLEEPER + "time.sleep(600)")

    def flow() -> None:
        with end_models_with("outer"):
            with end_models_with("inner"):
                running.append(Running(folder, tmp_path / "one"))
            assert running[0].error is None
            raise RuntimeError

    running: list[Running] = []
    with pytest.raises(RuntimeError):
        flow()
    assert "outer ended with RuntimeError" in str(running[0].ended())


def test_a_flow_after_a_stopped_one_runs_its_models(model):
    folder = model("print('a')")
    with end_models_with("first"):
        stop_all("cancelled")
        with pytest.raises(Stopped), end_models_with("a part of the first"):
            run(folder)
        with pytest.raises(Stopped):
            run(folder)
    with end_models_with("second"):
        assert [event["message"] for event in run(folder)] == ["a"]


def test_what_a_killed_caller_left_is_swept_by_the_next(model, tmp_path):
    folder = model("import os; os.kill(os.getppid(), 0); print(os.getcwd())")
    script = f"""
import os, signal
from pathlib import Path
from blocks.engines.process import ProcessEngine
ProcessEngine().run("train", Path({str(folder)!r}), {{}}, on_event=lambda event: os.kill(os.getpid(), signal.SIGKILL))
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    left = {path for path in scratch_folder().iterdir() if path.is_dir()}
    assert len(left) == 1
    run(folder)
    assert list(scratch_folder().iterdir()) == []


def test_an_exception_in_the_caller_ends_the_whole_process_tree(model, tmp_path):
    def refuse(event: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    folder = model(SLEEPER + "time.sleep(600)")
    with pytest.raises(KeyboardInterrupt):
        run(folder, {"output": str(tmp_path)}, on_event=refuse)
    assert all_gone(tmp_path)


def test_what_a_finished_model_leaves_behind_is_ended(model, tmp_path):
    """The child holds the model's stdout: waiting for the end of the stream would take ten minutes."""
    folder = model(SLEEPER)
    assert [event["message"] for event in run(folder, {"output": str(tmp_path)}, timeout_s=60)] == ["asleep"]
    assert all_gone(tmp_path)


@pytest.mark.parametrize("forked", [False, True], ids=["alone", "with a fork that holds the pipe"])
def test_killing_the_caller_ends_the_whole_process_tree(model, tmp_path, forked):
    folder = model(SLEEPER + "time.sleep(600)")
    script = f"""
import os, sys, threading, time
from pathlib import Path
from blocks.engines.process import ProcessEngine
def run():
    ProcessEngine().run("train", Path({str(folder)!r}), {{"output": {str(tmp_path)!r}}}, on_event=print)
if {forked}:
    threading.Thread(target=run).start()
    while not Path({str(tmp_path / "pids")!r}).exists():
        time.sleep(0.05)
    child = os.fork()
    if child == 0:
        time.sleep(600)
    Path({str(tmp_path / "fork")!r}).write_text(str(child))
else:
    run()
"""
    caller = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL)
    fork = tmp_path / "fork"
    try:
        assert wait_for((fork if forked else tmp_path / "pids").exists, 60)
        assert all(is_alive(pid) for pid in pids_in(tmp_path))
    finally:
        caller.kill()
        caller.wait()
    gone = all_gone(tmp_path)
    if forked:
        os.kill(int(fork.read_text()), signal.SIGKILL)
    assert gone


def test_killing_the_supervisor_ends_the_model(model, tmp_path):
    folder = model(SLEEPER + "time.sleep(600)")

    def kill(event: Mapping[str, Any]) -> None:
        psutil.Process(pids_in(tmp_path)[0]).parent().kill()

    with pytest.raises(ModelFailed):
        run(folder, {"output": str(tmp_path)}, on_event=kill)
    assert all_gone(tmp_path)


def test_the_model_gets_a_bare_environment(model, tmp_path, monkeypatch):
    for name in (
        "PREFECT_API_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "HTTPS_PROXY",
        "PYTHONSTARTUP",
    ):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    folder = model("""
        import json, os, pathlib, sys
        import contract
        pathlib.Path("scratch").write_text("a model may write where it stands")
        spec = json.loads(pathlib.Path(sys.argv[2]).read_text())
        found = {"environment": dict(os.environ), "contract": contract.__file__, "folder": os.getcwd()}
        pathlib.Path(spec["output"], "found.json").write_text(json.dumps(found))
    """)
    run(folder, {"output": str(tmp_path), "threads": 2})
    found = json.loads((tmp_path / "found.json").read_text())
    environment = found["environment"]
    assert "secret" not in environment.values()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        assert environment[name] == "2"
    assert found["contract"] == str(sources.SHARED[0])
    assert environment["HOME"] == environment["TMPDIR"] == found["folder"] != str(Path.cwd())
    assert not Path(found["folder"]).exists()


def test_describe_reads_what_the_model_says():
    description = ProcessEngine().describe(ROOT / "model_containers" / "ridge")
    assert description.name == "ridge"
    assert description.input == "means"


@pytest.mark.parametrize("text", ["", "[]", '{"name": "toy"}', '{"name": 1, "combinations": true, "embedding": true}'])
def test_describe_refuses_what_is_no_description(model, text):
    folder = model(f"""
        import json, pathlib, sys
        pathlib.Path(json.loads(pathlib.Path(sys.argv[2]).read_text())["output"], "describe.json").write_text({text!r})
    """)
    with pytest.raises(ModelFailed, match=r"toy describe did not write the describe\.json"):
        ProcessEngine().describe(folder)


def test_identity_follows_what_decides_the_results(model, tmp_path, monkeypatch):
    folder = model("print('a')")
    identity = ProcessEngine().identity
    seen = [identity(folder)]
    assert identity(folder) == seen[0]

    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "model.pyc").write_bytes(b"cache")
    assert identity(folder) == seen[0]
    moved = folder.rename(folder.parent / "renamed")
    assert identity(moved) == seen[0], "where a model lies does not decide what it computes"

    (moved / "weights").mkdir()
    (moved / "weights" / "prior.txt").write_text("1")
    seen.append(identity(moved))
    (moved / "requirements.txt").write_text("--index-url https://example.org\n# comment\nnumpy==0.0.1  # any\n")
    seen.append(identity(moved))
    other = tmp_path / "contract.py"
    other.write_text("changed")
    monkeypatch.setattr(sources, "SHARED", (other, *sources.SHARED[1:]))
    seen.append(identity(moved))
    monkeypatch.setattr(engines, "_read_versions", lambda *_: "numpy==0.0.2")
    seen.append(identity(moved))
    assert len(set(seen)) == len(seen)


def test_identity_names_a_package_that_is_not_installed(model):
    folder = model("")
    (folder / "requirements.txt").write_text("numpy==2.0.0\nno-such-package-anywhere==1.0\n")
    with pytest.raises(UserError, match=r"lacks a package.*no-such-package-anywhere\n.*CALIPERT_ENGINE=docker"):
        ProcessEngine().identity(folder)
