"""A training in a container that is killed with its flow goes on from what it had saved."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from blocks.config.paths import PROJECT_ROOT
from blocks.engines.base import ModelFailed
from blocks.engines.docker import checkpoints as docker_checkpoints
from blocks.engines.docker.checkpoints import FILE
from blocks.engines.docker.engine import DockerEngine
from blocks.engines.docker.limits import Limits
from core.errors import UserError
from tests.helpers.waiting import wait_for

pytestmark = pytest.mark.usefixtures("nothing_left")

# A model that does what its spec says, in Python.
OBEDIENT = """
import json, os, pathlib, sys, time
spec = json.loads(pathlib.Path(sys.argv[2]).read_text())
folder, output = pathlib.Path(spec["checkpoint"]), pathlib.Path(spec["output"])
exec(spec["code"])
"""
# Counts to 3, and saves how far it is. The first time it does not get beyond 2.
COUNTS = """
state = folder / "state" / "done"
done = int(state.read_text()) if state.exists() else 0
print("after", done, os.listdir(folder), folder, flush=True)
state.parent.mkdir(exist_ok=True)
for number in range(done + 1, 4):
    if number == 3 and done == 0:
        time.sleep(600)
    unfinished = folder / "unfinished"
    unfinished.write_text(str(number))
    unfinished.replace(state)
(output / "done").write_text(state.read_text())
"""
LIMITS = {"memory": 2**28, "output": 2**24, "output_files": 50, "temporary": 2**24, "shared_memory": 2**24}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are made all the time."""
    monkeypatch.setattr(docker_checkpoints, "EVERY_S", 0.1)
    monkeypatch.setattr(docker_checkpoints, "SHARE", 1.0)


@pytest.fixture(scope="module")
def model(docker_image: Callable[..., Path]) -> Path:
    return docker_image("saving", OBEDIENT)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The file in which a checkpoint is kept; it is not there yet."""
    for name in ("output", "checkpoint"):
        (tmp_path / name).mkdir()
    return tmp_path / "checkpoint" / FILE


def spec_of(kept: Path, code: str) -> dict[str, Any]:
    return {"code": dedent(code), "output": str(kept.parents[1] / "output"), "checkpoint": str(kept.parent)}


def run(
    model: Path, kept: Path, code: str, on_event: Callable[[Mapping[str, Any]], None] | None = None, **limits: Any
) -> list[str]:
    """What the model printed."""
    said: list[str] = []
    engine = DockerEngine(limits=Limits(**(LIMITS | limits)))
    hear = on_event or (lambda event: said.append(event["message"]))
    engine.run("train", model, spec_of(kept, code), on_event=hear, timeout_s=120)
    return said


def contents(kept: Path) -> dict[str, str]:
    if not kept.exists():
        return {}
    with tarfile.open(kept) as archive:
        files = {one.name: archive.extractfile(one) for one in archive if one.isfile()}
        return {name: file.read().decode() for name, file in files.items() if file}


CALLER = """
import json, sys
from pathlib import Path
from blocks.engines.docker import checkpoints as docker_checkpoints
from blocks.engines.docker.engine import DockerEngine
docker_checkpoints.EVERY_S, docker_checkpoints.SHARE = 0.1, 1.0
DockerEngine().run("train", Path(sys.argv[1]), json.loads(sys.argv[2]), on_event=lambda event: None)
"""


def test_what_is_killed_with_its_flow_goes_on(model, kept, nothing_left):
    caller = [sys.executable, "-c", CALLER, str(model), json.dumps(spec_of(kept, COUNTS))]
    with subprocess.Popen(caller, cwd=PROJECT_ROOT) as process:
        try:
            assert wait_for(lambda: contents(kept) == {"state/done": "2"})
        finally:
            process.kill()
    assert wait_for(lambda: nothing_left() == [], 30)
    assert run(model, kept, COUNTS) == ["after 2 ['state'] /checkpoint"]
    assert (kept.parents[1] / "output" / "done").read_text() == "3"


def test_without_a_checkpoint_to_go_on_from_it_begins(model, kept):
    assert run(model, kept, COUNTS.replace("time.sleep(600)", "pass")) == ["after 0 [] /checkpoint"]


def test_a_copy_is_of_one_moment(model, kept):
    """The model counts in two files, now the one, now the other, and between them lies one that takes time to read."""
    code = """
        (folder / "between").write_bytes(bytes(2**23))
        end, number = time.monotonic() + 5, 0
        while time.monotonic() < end:
            number += 1
            for name in ("a", "z"):
                (folder / "unfinished").write_text(str(number))
                (folder / "unfinished").replace(folder / name)
            if number % 2000 == 0:
                print(number, flush=True)
    """
    found: set[tuple[int, int]] = set()

    def look(event: Mapping[str, Any]) -> None:
        now = contents(kept)
        if "z" in now:
            found.add((int(now["a"]), int(now["z"])))

    run(model, kept, code, look)
    assert len(found) > 1
    assert {a - z for a, z in found} <= {0, 1}


@pytest.mark.parametrize(
    ("deed", "found"),
    [
        ("os.symlink('/etc/passwd', folder / 'link')", "'checkpoint/link', which is a symbolic link"),
        ("os.mkfifo(folder / 'pipe')", "'checkpoint/pipe', which is a pipe"),
        ("[(folder / str(n)).touch() for n in range(50)]", "more than 50 files and folders"),
        ("(folder / 'sparse').open('wb').truncate(2**40)", "more than 16,777,216 bytes, at 'checkpoint/sparse'"),
    ],
)
def test_what_may_not_be_kept_ends_the_stage_and_leaves_the_copy_before(model, kept, deed, found):
    code = f"""
        (folder / "good").write_text("good")
        time.sleep(3)
        {deed}
        time.sleep(600)
    """
    with pytest.raises(ModelFailed, match=f"saving train wrote what is refused as a checkpoint: {found}"):
        run(model, kept, code)
    assert contents(kept) == {"good": "good"}
    assert list((kept.parents[1] / "output").iterdir()) == []


def test_a_model_cannot_put_more_there_than_the_limit(model, kept):
    with pytest.raises(ModelFailed, match="No space left") as caught:
        run(model, kept, "(folder / 'big').write_bytes(bytes(2**25))")
    assert "to change it, set `output`" in str(caught.value)


def test_a_copy_that_cannot_be_taken_is_named(model, kept):
    with tarfile.open(kept, "w") as archive:
        big = tarfile.TarInfo("big")
        big.size = 2**22
        archive.addfile(big, io.BytesIO(bytes(big.size)))
    with pytest.raises(UserError, match=r"(?s)checkpoint\.tar.*the stage then starts from the beginning"):
        run(model, kept, "", output=2**20)


def test_copies_wait_where_they_take_long(model, kept, monkeypatch):
    monkeypatch.setattr(docker_checkpoints, "SHARE", 0.001)
    run(model, kept, "for n in range(40): (folder / str(n)).touch(); time.sleep(0.1)")
    assert kept.exists()
    assert len(contents(kept)) < 20
