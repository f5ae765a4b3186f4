"""`make setup` with stand-ins for pip and nvidia-smi: which PyTorch it asks for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
WITH_GPU = "echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'"
WITHOUT_GPU = "echo 'No devices found.'; exit 6"
UNREACHABLE = f'case "$*" in *{CPU_INDEX}*) exit 1;; esac'

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has the CPU index")


def write_command(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)


def run_setup(folder: Path, *arguments: str, nvidia_smi: str, pip: str = "") -> tuple[list[str], str]:
    """The indexes that pip is asked for torch, in order ("" for its usual ones), and what make prints."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    write_command(folder / "bin/nvidia-smi", nvidia_smi)
    write_command(folder / ".venv/bin/pip", 'echo "$*" >> pip.log', pip)
    environment = {name: value for name, value in os.environ.items() if name not in ("TORCH_INDEX", "MAKEFLAGS")}
    environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
    command = ["make", "setup", f"PYTHON={sys.executable}", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    calls = [line.split() for line in (folder / "pip.log").read_text().splitlines()]
    assert calls[-1][-2:] == ["--editable", "."]
    return [call[call.index("--index-url") + 1] if "--index-url" in call else "" for call in calls], done.stdout


def test_without_a_gpu_the_cpu_build_comes_first(tmp_path: Path) -> None:
    indexes, output = run_setup(tmp_path, nvidia_smi=WITHOUT_GPU)
    assert indexes == [CPU_INDEX, ""]
    assert "No NVIDIA GPU found" in output
    assert "cannot be installed" not in output


def test_with_a_gpu_pip_chooses(tmp_path: Path) -> None:
    assert run_setup(tmp_path, nvidia_smi=WITH_GPU)[0] == [""]


@pytest.mark.parametrize("nvidia_smi", [WITH_GPU, WITHOUT_GPU])
@pytest.mark.parametrize(
    ("given", "expected"), [("http://127.0.0.1:9/cpu", ["http://127.0.0.1:9/cpu", ""]), ("", [""])]
)
def test_the_index_that_is_given_wins(tmp_path: Path, nvidia_smi: str, given: str, expected: list[str]) -> None:
    assert run_setup(tmp_path, f"TORCH_INDEX={given}", nvidia_smi=nvidia_smi)[0] == expected


def test_an_index_that_cannot_be_used_is_reported_and_left_out(tmp_path: Path) -> None:
    indexes, output = run_setup(tmp_path, nvidia_smi=WITHOUT_GPU, pip=UNREACHABLE)
    assert indexes == [CPU_INDEX, ""]
    assert f"cannot be installed from {CPU_INDEX}" in output


def test_an_index_that_was_given_and_cannot_be_used_ends_the_setup(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        run_setup(tmp_path, f"TORCH_INDEX={CPU_INDEX}", nvidia_smi=WITHOUT_GPU, pip=UNREACHABLE)
