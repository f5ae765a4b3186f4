"""Engines: how a model's stage is run. Nothing above this module knows which one is in use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from prefect.blocks.core import Block
from pydantic import Field

Stage = Literal["describe", "train", "predict"]
Event = Mapping[str, Any]

LAST_LINES = 30
# All that a model's process gets of this one's environment: no setting, no credential, no proxy.
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# Waits for the end of its stdin, which comes when the process that started it is gone, however it died.
_WATCH = "import os, signal, sys; sys.stdin.buffer.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"


class ModelFailed(Exception):
    """A model's stage did not end well: which model and stage, how it ended, and its last lines."""


class ProcessEngine(Block):
    """Runs a model's stage as a process of its own on this machine, for machines without containers."""

    _block_type_name = "Calipert process engine"
    _block_type_slug = "calipert-process-engine"

    python: str = Field(default=sys.executable, description="Python of the environment that has the models' packages.")

    def run(
        self,
        stage: Stage,
        model_folder: Path,
        spec: Mapping[str, Any],
        *,
        on_event: Callable[[Event], None],
        timeout_s: float | None = None,
    ) -> None:
        """Run `model.py STAGE SPEC.json` of a model and wait for its end.

        spec: the stage's JSON (docs/models.md). on_event: called with each JSON line that the model prints; another line
        becomes a log event. timeout_s: wall-clock limit in seconds.
        Raises ModelFailed if the model exits with an error or takes too long. Whatever ends this call early, an
        exception of `on_event` or the death of this process included, ends the model's processes too.
        """
        name = f"{model_folder.name} {stage}"
        with tempfile.TemporaryDirectory(prefix="calipert-") as scratch:
            spec_file = Path(scratch) / "spec.json"
            spec_file.write_text(json.dumps(spec), encoding="utf-8")
            process = subprocess.Popen(
                [self.python, str(model_folder / "model.py"), stage, str(spec_file)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                cwd=scratch,
                env=_environment(model_folder, Path(scratch), int(spec.get("threads", 1))),
                start_new_session=True,
            )
            watcher = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WATCH, str(process.pid)],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
            last: deque[str] = deque(maxlen=LAST_LINES)
            late = threading.Event()
            errors = threading.Thread(target=lambda: last.extend(process.stderr or ()), daemon=True)

            def stop() -> None:
                late.set()
                _kill(process)

            limit = threading.Timer(timeout_s or 0, stop)
            try:
                errors.start()
                if timeout_s is not None:
                    limit.start()
                for line in process.stdout or ():
                    on_event(_event(line))
                process.wait()
                errors.join()
            finally:
                limit.cancel()
                _kill(process)
                watcher.kill()
                watcher.wait()
        if late.is_set():
            raise ModelFailed(f"{name} was stopped after {timeout_s:g} s, its limit.\n{''.join(last)}")
        if process.returncode:
            raise ModelFailed(f"{name} ended with exit code {process.returncode}.\n{''.join(last)}")

    def identity(self, model_folder: Path) -> str:
        """SHA-256 of what decides a model's results: its folder's files, the contract, its packages' versions."""
        files = sorted(p for p in model_folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        digest = sha256()
        for path in [model_folder.parent / "contract.py", *files]:
            digest.update(str(path.relative_to(model_folder.parent)).encode() + b"\0")
            digest.update(sha256(path.read_bytes()).digest())
        names = tuple(_required(model_folder / "requirements.txt"))
        digest.update(_versions(self.python, names).encode())
        return digest.hexdigest()


ENGINES: dict[str, type[ProcessEngine]] = {"process": ProcessEngine}


def _event(line: str) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    return event if isinstance(event, dict) and "event" in event else {"event": "log", "message": line.rstrip("\n")}


def _environment(model_folder: Path, scratch: Path, threads: int) -> dict[str, str]:
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return kept | {
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "PYTHONPATH": str(model_folder.parent),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
    }


def _kill(process: subprocess.Popen[str]) -> None:
    """End the process and everything in its group; fine if it has ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # Nobody is left in the group (on macOS a group of zombies is a permission error).
        pass
    process.wait()


def _required(requirements: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    return sorted(line.partition("==")[0].partition("[")[0].strip() for line in lines if line and line[0] != "-")


@cache
def _versions(python: str, names: tuple[str, ...]) -> str:
    """`name==version` lines of these packages and the Python version, as that interpreter has them."""
    ask = (
        "import sys; from importlib.metadata import version; "
        "print(sys.version_info[:3], *(f'{n}=={version(n)}' for n in sys.argv[1:]), sep='\\n')"
    )
    answer = subprocess.run([python, "-I", "-c", ask, *names], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise ModelFailed(
            f"{python} lacks a package that the model requires:\n{answer.stderr.strip().splitlines()[-1]}"
        )
    return answer.stdout
