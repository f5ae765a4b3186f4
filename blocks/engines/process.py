"""The engine of processes: each stage of a model is a process of its own on this machine."""

from __future__ import annotations

import json
import logging
import os
import re
import selectors
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path

from blocks.config.paths import MODEL_CONTAINERS, scratch_folder
from blocks.engines.base import WAIT_S, Engine, StageRun, Usage, describe_exit, model_variables
from blocks.engines.sources import find_sources, hash_sources
from blocks.local.cancellation import kill_on_stop, raise_if_stopped
from blocks.local.gpus import VISIBLE
from blocks.local.scratch import scratch
from core.errors import UserError

LOG = logging.getLogger("calipert.engines")

SUPERVISOR = Path(__file__).with_name("supervisor.py")
# All that a model's process gets of this one's environment: no setting, no credential, no proxy.
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class ProcessEngine(Engine):
    """Runs a model's stage as a process of its own on this machine, for machines without containers.

    The contract and the folders are those of a container, but without isolation: a model may read what this user may
    read, and reach the network. python: of the environment that has the models' packages.
    """

    python: str = sys.executable

    def run_stage(self, run: StageRun) -> Usage:
        """Run `model.py STAGE SPEC.json` under a supervisor that ends it, and all it started, with this process."""
        raise_if_stopped(run.name)
        with scratch(scratch_folder(), "model") as folder:
            status, spec_file = folder / "status", folder / "spec.json"
            spec_file.write_text(json.dumps(run.spec), encoding="utf-8")
            model = [self.python, str(run.model_folder.resolve() / "model.py"), run.stage, str(spec_file)]
            with subprocess.Popen(
                [sys.executable, "-I", "-S", str(SUPERVISOR), str(status), *model],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=self._environment(folder, run),
                pass_fds=() if run.gpu is None else (run.gpu.descriptor,),
                start_new_session=True,
            ) as process:
                try:
                    with kill_on_stop(run.name, partial(_kill_group, process)):
                        _follow(process, run)
                finally:
                    _kill_group(process)
            exit_code, usage = _read_status(status, process.returncode, run.device)
        if exit_code or usage is None:
            raise run.failure(describe_exit(exit_code), exit_code)
        LOG.debug("%s took %.1f s on %s", run.name, usage.seconds, usage.device)
        return usage

    def identity(self, model_folder: Path) -> str:
        """Return the SHA-256 of a model's files, the contract, and its packages' versions.

        Raises UserError if the environment lacks a package of the model's requirements.txt.
        """
        requirements = find_sources(model_folder).get("requirements.txt")
        lines = [] if requirements is None else requirements.read_text(encoding="utf-8").splitlines()
        names = sorted(found.group() for line in lines if (found := re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line)))
        versions = _read_versions(self.python, tuple(names), model_folder)
        return sha256((hash_sources(model_folder) + versions).encode()).hexdigest()

    def _environment(self, home: Path, run: StageRun) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        own = {
            "PATH": os.pathsep.join([str(Path(self.python).parent), kept.get("PATH", os.defpath)]),
            "PYTHONPATH": str(MODEL_CONTAINERS),
            VISIBLE: "" if run.gpu is None else run.gpu.id,
        }
        return kept | model_variables(str(home), run.threads) | own


def _follow(process: subprocess.Popen[bytes], run: StageRun) -> None:
    """Pass on what the model prints until both streams end.

    The supervisor holds both streams to its own end, so they end when all is over.
    """
    with selectors.DefaultSelector() as selector:
        for stream in filter(None, (process.stdout, process.stderr)):
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            run.check()
            ready = selector.select(WAIT_S)
            if not ready and process.poll() is not None:
                return  # the supervisor was killed from outside; another process may hold the streams open for long
            for key, _ in ready:
                chunk = os.read(key.fd, 2**16)
                if not chunk:
                    selector.unregister(key.fileobj)
                run.pass_on(key.fileobj is process.stdout, chunk, run.check)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the supervisor and all in its group; mostly the supervisor has done so itself."""
    # The group may be empty (which macOS calls a permission error while zombies are in it).
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _read_status(status: Path, supervisor_code: int, device: str) -> tuple[int, Usage | None]:
    """Return the model's exit code and usage as its supervisor wrote them.

    Where it could not write them: its own exit code alone.
    """
    if not status.exists():
        return supervisor_code, None
    report = json.loads(status.read_text(encoding="ascii"))
    return report.pop("exit_code"), Usage(**report, device=device)


@cache
def _read_versions(python: str, names: tuple[str, ...], model_folder: Path) -> str:
    """Return the Python version and `name==version` lines of these packages, as that interpreter has them.

    Raises UserError if it lacks one.
    """
    ask = (
        "import sys; from importlib.metadata import version; "
        "print(sys.version_info[:2], *(f'{n}=={version(n)}' for n in sys.argv[1:]), sep='\\n')"
    )
    answer = subprocess.run([python, "-I", "-c", ask, *names], capture_output=True, text=True, check=False)
    if answer.returncode:
        lacks = "".join(answer.stderr.strip().splitlines()[-1:]).rpartition("found for ")[2]
        found = f"{python} lacks a package: {lacks}"
        build = f"`calipert model build {model_folder.name}`, then set CALIPERT_ENGINE=docker (docs/containers.md)"
        remedy = f"run it in its image: {build}; or install here what the file lists, where that fits the rest"
        raise UserError(model_folder / "requirements.txt", "packages", found, remedy)
    return answer.stdout
