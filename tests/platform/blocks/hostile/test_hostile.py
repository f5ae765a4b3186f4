"""A model that means harm: each attempt fails, is reported, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import psutil
import pytest
from pydantic import ByteSize

from blocks.engines.base import ModelFailed, Stage
from blocks.engines.docker.engine import DockerEngine
from blocks.engines.docker.limits import Limits
from core.errors import UserError
from core.scoring.predictions import check_model_output

pytestmark = pytest.mark.usefixtures("nothing_left")

MEGABYTE = 2**20
LIMITS = Limits(
    memory=ByteSize(256 * MEGABYTE),
    pids=64,
    output=ByteSize(16 * MEGABYTE),
    output_files=100,
    temporary=ByteSize(8 * MEGABYTE),
    shared_memory=ByteSize(4 * MEGABYTE),
    printed=ByteSize(8 * MEGABYTE),
)
GENES = pd.Index([f"G{number:02d}" for number in range(30)])
ASKED = [{"covariate": "line", "condition": name} for name in ("A", "B", "A+B")]


@pytest.fixture(scope="module")
def model(docker_image: Callable[..., Path]) -> Path:
    return docker_image("hostile", Path(__file__).with_name("model.py").read_text())


@pytest.fixture
def attempts(model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Has the model do a misdeed; what it printed."""
    cells = tmp_path / "store" / "train.h5ad"
    cells.parent.mkdir()
    cells.write_text("cells of train and val")
    (tmp_path / "store" / "test.h5ad").write_text("cells of test")
    (tmp_path / "output").mkdir()

    def run(
        misdeed: str, stage: Stage = "train", *, timeout_s: float = 60, control: Path | None = None, **given: Any
    ) -> list[str]:
        events: list[Mapping[str, Any]] = []
        spec = {
            "hyperparameters": {"misdeed": misdeed} | given,
            "output": str(tmp_path / "output"),
            "cells": str(cells),
        }
        spec |= {} if control is None else {"control": str(control)}
        DockerEngine(limits=LIMITS).run(stage, model, spec, on_event=events.append, timeout_s=timeout_s)
        return [event.get("message", "") for event in events]

    return run


def all_refused(messages: list[str], least: int) -> bool:
    assert [message for message in messages if not message.startswith("refused")] == []
    return len(messages) >= least


def test_it_sees_nothing_of_the_host_but_its_own_files(attempts, tmp_path):
    (tmp_path / "secret").write_text("secret")
    paths = [str(tmp_path / "store" / "test.h5ad"), str(tmp_path / "secret"), str(Path(__file__)), "/etc/shadow"]
    assert all_refused(attempts("read_what_it_must_not", paths=paths), 16)


def test_it_reaches_nobody(attempts, tmp_path):
    with socket.create_server(("0.0.0.0", 0)) as server, socket.socket(socket.AF_UNIX) as here:  # noqa: S104
        here.bind("\0calipert-test")
        here.listen()
        port = server.getsockname()[1]
        hosts = {address.address for each in psutil.net_if_addrs().values() for address in each if address.family == 2}
        addresses = [(host, port) for host in sorted(hosts)]
        sockets = ["\0calipert-test", "/var/run/docker.sock"]
        assert all_refused(attempts("reach_out", addresses=addresses, sockets=sockets), 10)


def test_it_writes_nowhere_else_and_becomes_nobody_else(attempts, tmp_path):
    assert all_refused(attempts("write_elsewhere"), 30)
    assert (tmp_path / "store" / "train.h5ad").read_text() == "cells of train and val"


def test_forks_end_at_the_limit_of_processes_and_of_time(attempts):
    began = time.monotonic()
    with pytest.raises(ModelFailed, match="was stopped after 6 s"):
        attempts("fork_without_end", timeout_s=6)
    assert time.monotonic() - began < 40


def test_while_it_forks_this_machine_has_few_more_processes(attempts, docker_client, nothing_left):
    most: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.3):
            most.append(
                sum(
                    "/model/model.py" in " ".join(each.info["cmdline"] or [])
                    for each in psutil.process_iter(["cmdline"])
                )
            )

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with pytest.raises(ModelFailed):
            attempts("fork_without_end", timeout_s=5)
    finally:
        over.set()
        thread.join()
    assert 10 < max(most) <= LIMITS.pids


def test_what_it_leaves_running_ends_with_it(attempts):
    attempts("leave_processes_behind")
    left = [
        each for each in psutil.process_iter(["cmdline"]) if "/model/model.py" in " ".join(each.info["cmdline"] or [])
    ]
    assert left == []


def test_memory(attempts):
    with pytest.raises(ModelFailed, match=r"ran out of memory, of which it may use 0\.25 GiB"):
        attempts("eat_memory")


def test_no_disk_is_filled(attempts):
    taken = json.loads(attempts("fill")[-1])
    limits = {"/tmp": 8, "/dev/shm": 4, "/output": 16}  # noqa: S108
    for folder, (named, nameless, files) in taken.items():
        limit = limits.get(folder, 0)
        assert named <= limit, folder
        assert nameless <= limit, folder
        assert limit or files == 0, folder
    assert taken["/output"][0] >= 15, "what it may write, it can"
    assert 90 <= taken["/output"][2] <= LIMITS.output_files + 1


@pytest.mark.parametrize(
    "line",
    [
        "x" * 1000 + "\n",
        "x" * 65_536,
        '{"event": "metric", "name": "r2", "step": 1, "value": 1e400}\n',
        "\r\n\r\n",
        "[" * 60_000,
    ],
    ids=["lines", "one line", "metrics", "empty lines", "brackets"],
)
def test_printing_ends(attempts, line):
    with pytest.raises(ModelFailed, match=r"after it had printed 8\.0MiB, its limit"):
        attempts("print_without_end", line=line)


@pytest.mark.parametrize(
    ("misdeed", "words"),
    [
        ("link", "'output/predictions.h5ad', which is a symbolic link"),
        ("link_a_folder", "'output/weights', which is a symbolic link"),
        ("link_hard", "which is a hard link"),
        ("leave_a_pipe", "which is a pipe"),
        ("leave_a_deep_folder", "a path of more than 1024 bytes"),
        ("leave_too_much", r"more than 16,777,216 bytes, at 'output/sparse'"),
    ],
)
def test_an_output_of_tricks_is_refused_whole(attempts, tmp_path, misdeed, words):
    (tmp_path / "victim").mkdir()
    with pytest.raises(ModelFailed, match=f"train wrote what is refused: .*{words}"):
        attempts(misdeed, target=str(tmp_path / "victim"))
    assert list((tmp_path / "output").iterdir()) == []
    assert list((tmp_path / "victim").iterdir()) == []


def test_strange_names_are_names(attempts, tmp_path):
    attempts("leave_strange_names")
    names = {os.fsencode(path.name) for path in (tmp_path / "output").iterdir()}
    assert names == {b"\xff\xfe", b"new\nline", b"\x1b[2J", b"..\\..\\up", b"-rf", b"$(id)"}


def test_the_curve_that_was_watched_is_not_replaced(attempts, tmp_path):
    (tmp_path / "output" / "training.jsonl").write_text("watched")
    with pytest.raises(ModelFailed, match=r"'training\.jsonl', a name that the benchmark uses itself"):
        attempts("replace_the_curve")
    assert (tmp_path / "output" / "training.jsonl").read_text() == "watched"


# ---- predictions, which the engine hands on and the benchmark checks


def predictions(keys: list[dict[str, str]], value: float = 1.0) -> ad.AnnData:
    obs = pd.DataFrame(keys, index=[f"{key['covariate']}|{key['condition']}" for key in keys], dtype=object)
    return ad.AnnData(np.full((len(keys), len(GENES)), value), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture
def handed_in(attempts, tmp_path) -> Callable[..., Any]:
    """What the benchmark says to predictions that the model hands in as they are."""

    def hand_in(file: ad.AnnData | Path, **given: Any) -> Any:
        control = tmp_path / "prepared.h5ad"
        if isinstance(file, ad.AnnData):
            file.write_h5ad(control, compression="gzip")
        else:
            file.rename(control)
        attempts("deliver", "predict", control=control, **given)
        return check_model_output(tmp_path / "output", ASKED, GENES, "hostile")

    return hand_in


def test_good_predictions_are_taken(handed_in):
    profiles, unpredicted = handed_in(predictions(ASKED[:2]), unpredicted=[ASKED[2] | {"reason": "none"}])
    assert profiles.n_obs == 2
    assert len(unpredicted) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_values_that_are_no_predictions(handed_in, value):
    with pytest.raises(UserError, match=r"(?s)output of hostile.*field:  X"):
        handed_in(predictions(ASKED, value))


@pytest.mark.parametrize("key", [("line", "C"), ("line", "control"), ("other", "A")])
def test_conditions_of_others(handed_in, key):
    with pytest.raises(UserError, match=r"(?s)output of hostile.*(not test conditions|which the data set lacks)"):
        handed_in(predictions([*ASKED, dict(zip(("covariate", "condition"), key, strict=True))]))


def test_far_too_many_rows(handed_in):
    many = [{"covariate": "line", "condition": f"C{number}"} for number in range(100)]
    whole = ad.concat([predictions(many)] * 600)
    whole.obs_names = [str(number) for number in range(whole.n_obs)]
    with pytest.raises(UserError, match=r"(?s)output of hostile.*59900 duplicated rows"):
        handed_in(whole)


def test_a_small_file_that_says_to_be_huge(handed_in, tmp_path):
    path = tmp_path / "huge.h5ad"
    predictions(ASKED).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", shape=(3, 10**12), dtype="f8", chunks=(1, 10**6))
        file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    assert path.stat().st_size < MEGABYTE
    with pytest.raises(UserError, match=r"(?s)prepared|predictions\.h5ad.*bytes"):
        handed_in(path)


@pytest.mark.parametrize("kind", ["link", "external", "virtual"])
def test_predictions_that_are_read_from_another_file(handed_in, tmp_path, kind):
    """The benchmark could open what the model could not: the truth, say, as its own predictions."""
    truth, path = tmp_path / "truth.h5ad", tmp_path / "thief.h5ad"
    predictions(ASKED).write_h5ad(truth)
    predictions(ASKED).write_h5ad(path)
    with h5py.File(truth) as file, h5py.File(path, "r+") as thief:
        shape, offset = file["X"].shape, file["X"].id.get_offset()
        attributes = dict(thief["X"].attrs)
        del thief["X"]
        if kind == "link":
            thief["X"] = h5py.ExternalLink(str(truth), "X")
        elif kind == "external":
            thief.create_dataset("X", shape, "f8", external=[(str(truth), offset, 8 * shape[0] * shape[1])])
        else:
            layout = h5py.VirtualLayout(shape, "f8")
            layout[:] = h5py.VirtualSource(str(truth), "X", shape)
            thief.create_virtual_dataset("X", layout)
        if kind != "link":
            thief["X"].attrs.update(attributes)
    with pytest.raises(UserError, match=r"(?s)predictions\.h5ad.*from elsewhere"):
        handed_in(path)


def test_a_pickle_is_not_opened(attempts, tmp_path):
    mark = tmp_path / "mark"
    attempts("write_a_pickle", "predict", mark=str(mark))
    with pytest.raises(UserError, match=r"predictions\.h5ad"):
        check_model_output(tmp_path / "output", ASKED, GENES, "hostile")
    assert not mark.exists()
