"""No temporary folder outlives its process; none that is in use is touched."""

from __future__ import annotations

import fcntl
import logging
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from blocks.config.paths import PROJECT_ROOT
from blocks.local.scratch import scratch, sweep

HOLDER = """
import sys, time
from pathlib import Path
from blocks.local.scratch import scratch
with scratch(Path(sys.argv[1]), "work") as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text("x")
    print(folder.name, flush=True)
    time.sleep(600)
"""


def holder(parent: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(parent)], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_folder_is_there_for_the_block_and_gone_after_it(tmp_path: Path) -> None:
    parent = tmp_path / "made" / "here"
    with scratch(parent, "work") as folder:
        assert folder.parent == parent
        assert folder.name.startswith(f"work.{platform.node()}.")
        assert list(folder.iterdir()) == []
        (folder / "file").write_text("x")
    assert list(parent.iterdir()) == []


def test_it_goes_with_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch(tmp_path, "work"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_and_what_a_living_one_uses_stays(tmp_path: Path) -> None:
    living, kept = holder(tmp_path)
    killed, left = holder(tmp_path)
    try:
        killed.kill()
        killed.communicate()
        assert (tmp_path / left / "deep" / "file").exists()
        with scratch(tmp_path, "work") as mine:
            expected = {kept, f"{kept}.lock", mine.name, f"{mine.name}.lock"}
            assert {path.name for path in tmp_path.iterdir()} == expected
        assert (tmp_path / kept / "deep" / "file").read_text() == "x"
    finally:
        living.kill()
        living.communicate()
    sweep(tmp_path, "work")
    assert list(tmp_path.iterdir()) == []


def test_its_own_folders_are_in_use_as_well(tmp_path: Path) -> None:
    with scratch(tmp_path, "work") as outer, scratch(tmp_path, "work") as inner:
        sweep(tmp_path, "work")
        assert outer.is_dir()
        assert inner.is_dir()


def test_other_hosts_prefixes_and_strangers_are_let_alone(tmp_path: Path) -> None:
    host = platform.node()
    names = [f"work.{host}.example.abc", "work.elsewhere.abc", f"other.{host}.abc", "work", f"workshop.{host}.abc"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.lock").touch()
    before = sorted(tmp_path.iterdir())
    with scratch(tmp_path, "work"):
        pass
    assert sorted(tmp_path.iterdir()) == before


def test_a_lock_that_was_left_without_its_folder_goes(tmp_path: Path) -> None:
    """Killed before the folder was made, or after it was removed."""
    (tmp_path / f"work.{platform.node()}.abc.lock").touch()
    sweep(tmp_path, "work")
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_between_making_the_lock_file_and_locking_it_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    swept: list[int] = []

    def late(descriptor: int, operation: int) -> None:
        if not swept:
            swept.append(descriptor)
            sweep(tmp_path, "work")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with scratch(tmp_path, "work") as folder:
        assert swept
        sweep(tmp_path, "work")
        assert {path.name for path in tmp_path.iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert list(tmp_path.iterdir()) == []


def test_many_threads_that_sweep_and_make_folders(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                with scratch(tmp_path, "work") as folder:
                    (folder / "file").write_text("x")
                    time.sleep(0)
                    assert (folder / "file").read_text() == "x"
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed_is_said_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / f"work.{platform.node()}.abc"
    left.mkdir()
    left.with_name(f"{left.name}.lock").touch()

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    with monkeypatch.context() as other_user, caplog.at_level(logging.WARNING, "calipert.scratch"):
        other_user.setattr(shutil, "rmtree", refuse)
        sweep(tmp_path, "work")
    assert f"cannot be removed: {left}" in caplog.text
    with scratch(tmp_path, "work") as folder:
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []
