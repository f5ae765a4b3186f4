"""What all engines share: how a stage of a model is asked for, what it took, and how it fails."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar, Literal

from blocks.config.paths import scratch_folder
from blocks.engines.lines import LONGEST_LINE, Event, read_event, split_lines
from blocks.local.cancellation import raise_if_stopped
from blocks.local.gpus import Gpu
from blocks.local.scratch import scratch
from core.io.h5ad import read_foreign_json
from model_containers.contract import THREAD_VARIABLES, ContractError, Description

Stage = Literal["describe", "train", "predict", "embed"]

# Of what a model writes to stderr, kept for the error message.
LAST_LINES = 30
# The user and the group that a container runs as where the caller is root: they may do nothing on the host.
UNPRIVILEGED_ID = 65534
# An exception that another thread raises in this one (a task's time limit) arrives only between two waits.
WAIT_S = 0.5


@dataclass(frozen=True)
class Usage:
    """What a model's stage took; None where the engine cannot know it.

    seconds: wall clock. cpu_seconds: of its processes, those excepted that it never waited for. peak_memory_bytes: of
    its largest process, not the sum over processes; of a container, of all its processes at the moments of a look at
    it. device: `cpu`, or what it had of GPUs, as the engine names them.
    """

    seconds: float
    cpu_seconds: float | None
    peak_memory_bytes: int | None
    device: str


@dataclass(eq=False)
class ModelFailed(Exception):
    """A model's stage did not end well.

    model, stage: whose. ending: how, in words. exit_code: its exit code, minus the number of the signal that killed
    it, or None if it was stopped here. last_lines: the end of what it wrote to stderr.
    """

    model: str
    stage: str
    ending: str
    exit_code: int | None
    last_lines: tuple[str, ...]

    def __post_init__(self) -> None:
        """Give all to Exception as well, in this order, so that the error survives pickling between processes."""
        self.args = (self.model, self.stage, self.ending, self.exit_code, self.last_lines)

    def __str__(self) -> str:
        """Return the message."""
        return "\n".join([f"{self.model} {self.stage} {self.ending}", *(f"  {line}" for line in self.last_lines)])


@dataclass(frozen=True)
class StageRun:
    """One stage of a model that an engine runs: the arguments of `Engine.run`, and what has come of it so far.

    began: when, on the monotonic clock. last: the end of what it wrote to stderr. rests: of each stream (whether it is
    stdout), the beginning of a line.
    """

    stage: Stage
    model_folder: Path
    spec: Mapping[str, Any]
    on_event: Callable[[Event], None]
    timeout_s: float | None
    gpu: Gpu | None
    began: float
    last: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    rests: dict[bool, bytes] = field(default_factory=lambda: {True: b"", False: b""})

    @property
    def model(self) -> str:
        """The model's name, which is that of its folder."""
        return self.model_folder.name

    @property
    def name(self) -> str:
        """Model and stage, for messages."""
        return f"{self.model} {self.stage}"

    @property
    def threads(self) -> int:
        """How many threads the model may compute with."""
        return int(self.spec.get("threads", 1))

    @property
    def device(self) -> str:
        """What Usage says of a leased GPU, or none."""
        return "cpu" if self.gpu is None else f"GPU {self.gpu.id}"

    def check(self) -> None:
        """Raise what ends the stage before its own end: Stopped with its flow, ModelFailed at its time limit."""
        raise_if_stopped(self.name)
        if self.timeout_s is not None and monotonic() - self.began >= self.timeout_s:
            raise self.failure(self.describe_time_limit())

    def pass_on(self, stdout: bool, chunk: bytes, check: Callable[[], None]) -> None:
        """Pass on the events in what the model printed next on stdout, or keep what it wrote to stderr.

        An empty chunk is the end of the stream. check: called before each line; raises what ends the stage before its
        own end.
        """
        lines, self.rests[stdout] = split_lines(self.rests[stdout], chunk)
        for line in lines:
            check()
            if stdout:
                self.on_event(read_event(line))
            else:
                self.last.append(line)

    def failure(self, ending: str, exit_code: int | None = None) -> ModelFailed:
        """Create the error that says how the stage ended."""
        return ModelFailed(self.model, self.stage, ending, exit_code, tuple(self.last))

    def describe_time_limit(self, doing: str = "") -> str:
        """Say that the stage was stopped after its limit, while what, and where to change it."""
        stopped = f"was stopped after {self.timeout_s:g} s, its limit{doing}"
        if self.stage == "describe":
            return f"{stopped}: a model has to describe itself at once (docs/models.md)"
        limit, entry = f"time_limits: {{{self.stage}: SECONDS}}", "model"
        if self.stage == "embed":
            limit, entry = "time_limit: SECONDS", "embedding"
        return f"{stopped}: to change it, set `{limit}` in the {entry}'s entry of the catalog (docs/models.md)"


class Engine(ABC):
    """What runs models, on this machine or on others, with more or less isolation."""

    # How long a model may take to describe itself.
    describe_limit_s: ClassVar[float] = 120.0

    def run(
        self,
        stage: Stage,
        model_folder: Path,
        spec: Mapping[str, Any],
        *,
        on_event: Callable[[Event], None],
        timeout_s: float | None = None,
        gpu: Gpu | None = None,
    ) -> Usage:
        """Run a stage of a model and wait for its end.

        spec: the stage's JSON (docs/models.md), with paths of this machine. on_event: called in this thread with each
        event that the model prints; any other line becomes a log event. timeout_s: wall-clock limit in seconds. gpu:
        the leased one that the model may use (blocks.local.gpus); it sees no other, and none without a lease.
        Raises ModelFailed if the model exits with an error, is killed, takes longer, or does what the engine refuses;
        UserError if the engine cannot run it; and Stopped if its flow ends meanwhile or has ended
        (blocks.local.cancellation). Whatever ends this call, be it the model's own end, an exception of `on_event`, a
        cancellation or the death of this process by any signal, ends all that runs of the model; the GPU stays leased
        until then.
        """
        return self.run_stage(StageRun(stage, model_folder, spec, on_event, timeout_s, gpu, monotonic()))

    @abstractmethod
    def run_stage(self, run: StageRun) -> Usage:
        """Do what `run` says, in the engine's own way."""

    @abstractmethod
    def identity(self, model_folder: Path) -> str:
        """Return what decides a model's results, in one word. Raises UserError where the engine cannot run it."""

    def describe(self, model_folder: Path) -> Description:
        """Return what a model says that it can do and needs.

        Raises ModelFailed as `run` does, and where the model does not say it as the contract wants.
        """
        with scratch(scratch_folder(), "description") as output:
            spec = {"output": str(output)}
            limit = self.describe_limit_s
            self.run("describe", model_folder, spec, on_event=lambda event: None, timeout_s=limit)
            try:
                return Description(**read_foreign_json(output / "describe.json", LONGEST_LINE))
            except (OSError, ValueError, TypeError, ContractError) as error:
                ending = f"did not write the describe.json of docs/models.md: {error}"
                raise ModelFailed(model_folder.name, "describe", ending, 0, ()) from error


def model_variables(home: str, threads: int) -> dict[str, str]:
    """Return the environment variables that every model gets. home: the folder of its temporary files."""
    return {
        "HOME": home,
        "TMPDIR": home,
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
    }


def count_seconds(began: str, ended: str) -> float:
    """Return the seconds between two times as the APIs of containers write them."""
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()


def describe_exit(exit_code: int) -> str:
    """Say how a process ended. exit_code: minus the signal's number for a process that was killed."""
    if exit_code == -signal.SIGKILL:
        return "was killed (SIGKILL): most often the machine ran out of memory"
    if exit_code < 0:
        return f"was killed ({signal.Signals(-exit_code).name})"
    return f"ended with exit code {exit_code}"
