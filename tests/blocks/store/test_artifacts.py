from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import blocks.store.artifacts
import blocks.store.checksums
from blocks.config.paths import PROJECT_ROOT
from blocks.store.artifacts import JSON, ArtifactStore, artifact_key
from core.catalog.schema import DatasetSpec
from core.errors import UserError
from core.prepare.cells import write_cells
from core.simulate import SimulationSettings, simulate
from tasks.artifacts import Recipe, build_or_get
from tests.helpers.small_artifact import refuse, write

INPUTS = {"cells": "ab12"}
PARAMETERS: dict[str, JSON] = {"seed": 42, "rate": 0.1, "names": ["a", "b"]}
CODE = "c0de"
KEY = artifact_key("reference", INPUTS, PARAMETERS, CODE)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(root=str(tmp_path / "store"))


def obtain(store: ArtifactStore, build: Callable[[Path], None] = write) -> Path:
    return store.obtain("reference", KEY, build, inputs=INPUTS, parameters=PARAMETERS, code=CODE)


def everything(store: ArtifactStore) -> list[str]:
    """All files and folders but the lock files, which stay."""
    root = Path(store.root)
    paths = (path.relative_to(root).as_posix() for path in root.rglob("*"))
    return sorted(path for path in paths if not path.startswith(".locks"))


# Keys


def test_key_is_the_same_on_every_machine() -> None:
    assert KEY == "3d67e8866927d42a840aac466a5feb825f66c4db733fd46fd64ee4f51db6583b"


def test_key_ignores_the_order_of_names_and_the_kind_of_sequence() -> None:
    turned: dict[str, Any] = {"names": ("a", "b"), "rate": 0.1, "seed": 42}
    assert artifact_key("reference", INPUTS, turned, CODE) == KEY


@pytest.mark.parametrize(
    "recipe",
    [
        ("other", INPUTS, PARAMETERS, CODE),
        ("reference", {"cells": "ab13"}, PARAMETERS, CODE),
        ("reference", {"more": "ab12"}, PARAMETERS, CODE),
        ("reference", INPUTS, PARAMETERS | {"rate": float(np.nextafter(0.1, 1))}, CODE),
        ("reference", INPUTS, PARAMETERS | {"seed": 42.0}, CODE),
        ("reference", INPUTS, PARAMETERS | {"seed": "42"}, CODE),
        ("reference", INPUTS, PARAMETERS | {"names": ["b", "a"]}, CODE),
        ("reference", INPUTS, PARAMETERS | {"more": None}, CODE),
        ("reference", INPUTS, PARAMETERS, "c0df"),
    ],
)
def test_key_changes_with_everything_in_the_recipe(recipe: tuple[Any, ...]) -> None:
    assert artifact_key(*recipe) != KEY


@pytest.mark.parametrize(
    ("value", "error", "place"),
    [
        ({1: "a"}, TypeError, "deep.inner: the name 1 is not a string"),
        ({"x": [1, {2}]}, TypeError, r"deep.inner.x\[1\]"),
        (np.int64(3), TypeError, "deep.inner"),
        (Path("a"), TypeError, "deep.inner"),
        (float("nan"), ValueError, "not JSON compliant"),
        (float("inf"), ValueError, "not JSON compliant"),
    ],
)
def test_key_refuses_what_json_cannot_hold(value: Any, error: type[Exception], place: str) -> None:
    with pytest.raises(error, match=place):
        artifact_key("reference", INPUTS, {"deep": {"inner": value}}, CODE)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
)
TREES = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)), max_leaves=8)


@given(parameters=st.dictionaries(st.text(), TREES))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_parameters_come_back_from_the_manifest(tmp_path: Path, parameters: dict[str, Any]) -> None:
    store = ArtifactStore(root=str(tmp_path / "store"))
    key = artifact_key("any", {}, parameters, CODE)
    folder = store.obtain("any", key, lambda _: None, inputs={}, parameters=parameters, code=CODE)
    assert store.obtain("any", key, refuse, inputs={}, parameters=parameters, code=CODE) == folder


# Building and finding


def test_obtain_builds_once_and_publishes_read_only_files_with_a_manifest(store: ArtifactStore) -> None:
    folder = obtain(store)
    assert obtain(store, refuse) == folder
    assert (folder / "table.txt").read_text(encoding="utf-8") == "0123456789"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o444}
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest | {"created": None, "files": None} == {
        "schema_version": 1,
        "kind": "reference",
        "key": KEY,
        "inputs": INPUTS,
        "parameters": PARAMETERS,
        "code": CODE,
        "files": None,
        "created": None,
    }
    assert manifest["files"] == {
        "table.txt": {
            "size": 10,
            "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",
        },
        "weights/layer.bin": {
            "size": 1000,
            "sha256": "541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53",
        },
    }
    assert sorted(everything(store)) == [
        ".temporary",
        "reference",
        f"reference/{KEY}",
        f"reference/{KEY}/manifest.json",
        f"reference/{KEY}/table.txt",
        f"reference/{KEY}/weights",
        f"reference/{KEY}/weights/layer.bin",
    ]


def test_another_process_finds_what_this_one_built(store: ArtifactStore) -> None:
    folder = obtain(store)
    script = f"""
import sys
from blocks.store.artifacts import ArtifactStore
recipe = dict(inputs={INPUTS!r}, parameters={PARAMETERS!r}, code={CODE!r})
print(ArtifactStore(root=sys.argv[1]).obtain("reference", {KEY!r}, None, **recipe))
"""
    command = [sys.executable, "-c", script, store.root]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert found.stdout.strip() == str(folder)


def test_the_files_of_two_stores_are_equal_but_for_the_time(store: ArtifactStore, tmp_path: Path) -> None:
    one, two = obtain(store), obtain(ArtifactStore(root=str(tmp_path / "other")))
    for path in one.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()
    manifests = [json.loads((folder / "manifest.json").read_text(encoding="utf-8")) for folder in (one, two)]
    assert manifests[0] | {"created": 0} == manifests[1] | {"created": 0}


def test_a_store_survives_pickling(store: ArtifactStore) -> None:
    assert pickle.loads(pickle.dumps(store)).root == store.root  # noqa: S301


def test_the_default_root_lies_in_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path))
    assert ArtifactStore().root == str(tmp_path / "store")


def test_a_key_of_another_recipe_is_refused(store: ArtifactStore) -> None:
    with pytest.raises(ValueError, match="is not the key of this reference"):
        store.obtain("reference", KEY, write, inputs=INPUTS, parameters={}, code=CODE)
    assert not Path(store.root).exists()


@pytest.mark.parametrize(("kind", "key"), [("../up", KEY), (".temporary", KEY), ("cells", "short"), ("", KEY)])
def test_names_that_could_leave_the_store_are_refused(store: ArtifactStore, kind: str, key: str) -> None:
    with pytest.raises(ValueError, match="is not a k"):
        store._folder(kind, key)


# Failures


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_failing_build_leaves_nothing(store: ArtifactStore, error: BaseException) -> None:
    def build(folder: Path) -> None:
        write(folder)
        raise error

    with pytest.raises(type(error)):
        obtain(store, build)
    assert everything(store) == [".temporary"]
    assert obtain(store).is_dir()


def link(folder: Path) -> None:
    (folder / "link").symlink_to("/etc/hostname")


def link_to_folder(folder: Path) -> None:
    (folder / "link").symlink_to("/etc")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def own_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize("build", [link, link_to_folder, pipe, own_manifest])
def test_only_regular_files_are_published(store: ArtifactStore, build: Callable[[Path], None]) -> None:
    with pytest.raises(ValueError, match=r"regular files only|writes this file itself"):
        obtain(store, build)
    assert everything(store) == [".temporary"]


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_a_library() -> None:
    raise RuntimeError("Can't write data (file write failed: error message = 'No space left on device')")


def full_behind_another_error() -> None:
    try:
        full()
    except OSError as error:
        raise RuntimeError("could not save") from error


@pytest.mark.parametrize("fail", [full, full_in_a_library, full_behind_another_error])
def test_a_full_disk_is_an_error_that_says_what_is_free(store: ArtifactStore, fail: Callable[[], None]) -> None:
    def build(folder: Path) -> None:
        write(folder)
        fail()

    with pytest.raises(UserError, match=r"free disk space[\s\S]* MB are free[\s\S]*CALIPERT_DATA") as caught:
        obtain(store, build)
    assert caught.value.where == store.root
    assert everything(store) == [".temporary"]


def test_a_disk_that_fills_up_while_the_manifest_is_written(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks.store.artifacts, "_sync", lambda path: full())
    with pytest.raises(UserError, match="free disk space"):
        obtain(store)
    assert everything(store) == [".temporary"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of so many bytes and files, and gives its folder; skips where that is not permitted."""
    mounted: list[Path] = []

    def mount(size: int, files: int = 10_000) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={files}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no right to mount a file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(disk: Callable[..., Path]) -> None:
    store = ArtifactStore(root=str(disk(1 << 20) / "store"))

    def build(folder: Path) -> None:
        (folder / "large.bin").write_bytes(b"\1" * (2 << 20))

    with pytest.raises(UserError) as caught:
        obtain(store, build)
    assert (caught.value.where, caught.value.field) == (store.root, "free disk space")
    assert "1.0 MB are free, and it needs more than that" in caught.value.found
    assert everything(store) == [".temporary"]
    assert obtain(store).is_dir()


def test_a_disk_without_room_for_the_folder_of_the_store(disk: Callable[..., Path]) -> None:
    store = ArtifactStore(root=str(disk(1 << 20, files=1) / "store"))
    with pytest.raises(UserError, match="free disk space"):
        obtain(store, refuse)
    assert not Path(store.root).exists()


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatasetSpec]:
    """A small raw file, and its entry. About 1.2 MB to the spill and as much to the result."""
    path = tmp_path_factory.mktemp("raw") / "raw.h5ad"
    settings = SimulationSettings(genes=300, singles=12, cells_per_condition=60, control_cells=200)
    simulate(settings).cells.write_h5ad(path)
    entry = {
        "name": "screen",
        "title": "a small screen",
        "task": "single",
        "source": {"kind": "local", "hint": "made by a test"},
        "labels": {"column": "perturbation"},
        "min_genes_per_cell": 0,
    }
    return path, DatasetSpec.model_validate(entry)


def prepare(screen: tuple[Path, DatasetSpec], memory: int = 1 << 20) -> Path:
    raw, spec = screen

    def build(folder: Path) -> None:
        write_cells(raw, spec, {}, folder, memory)

    return build_or_get(Recipe("cells", {"raw": "ab12"}, {}, CODE), build)


def nothing_published(store: ArtifactStore) -> bool:
    return everything(store) == [".temporary"]


def test_a_preparation_that_will_not_fit_is_refused_before_it_writes(
    screen: tuple[Path, DatasetSpec], disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = disk(1 << 20)
    monkeypatch.setenv("CALIPERT_DATA", str(folder))
    monkeypatch.setattr("core.prepare.cells.Spill", refuse)
    with pytest.raises(UserError) as caught:
        prepare(screen)
    assert caught.value.where.startswith(f"{folder}/store")
    assert re.fullmatch(
        r"0\.001 GB free; about 0\.00\d GB are needed for the \d+ chosen cells: 0\.00\d GB are missing",
        caught.value.found,
    )
    assert nothing_published(ArtifactStore())


@pytest.mark.parametrize(("room", "full"), [(0.3, "spill"), (0.7, "cells.h5ad"), (0.9, "cells.h5ad")])
def test_a_disk_that_fills_up_under_a_preparation(
    room: float,
    full: str,
    screen: tuple[Path, DatasetSpec],
    disk: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As where others write to it too: the check beforehand knows nothing of them."""
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path))
    whole = prepare(screen)
    values = json.loads((whole / "manifest.json").read_text(encoding="utf-8"))["files"]["cells.h5ad"]["size"]
    spilt: list[int] = []

    def fit_always(n: int) -> int:
        spilt.append(8 * n)
        return 0

    monkeypatch.setattr("core.prepare.cells.estimate_bytes", fit_always)
    shutil.rmtree(tmp_path / "store")
    prepare(screen)
    most = spilt[0] + values
    folder = disk(int(most * room) >> 12 << 12)
    assert (most * room < spilt[0]) == (full == "spill")
    monkeypatch.setenv("CALIPERT_DATA", str(folder))
    with pytest.raises(UserError) as caught:
        prepare(screen)
    assert caught.value.where.startswith(str(folder / "store"))
    assert caught.value.field == "free disk space"
    free = shutil.disk_usage(folder).free
    if full == "spill":
        assert f"{free / 1e6:,.1f} MB are free, and it needs more than that" in caught.value.found
    else:
        # Seen before HDF5 meets it, which would not survive.
        assert re.search(r"GB are needed for the next rows of cells\.h5ad: .* are missing", caught.value.found)
    assert free > most * room - 100_000
    assert nothing_published(ArtifactStore())


# A store that cannot be written


@pytest.fixture
def locked(disk: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[[ArtifactStore], None]]:
    """Makes a store read-only: by the rights of its folders, or, for root, whom they do not stop, by its mount."""
    shut: list[Path] = []

    def lock(store: ArtifactStore) -> None:
        root = Path(store.root)
        if os.geteuid() == 0:
            subprocess.run(["mount", "-o", "remount,ro", str(root.parent)], check=True, capture_output=True)
        else:
            shut.extend(folder for folder in (root, *root.rglob("*")) if folder.is_dir())
            for folder in shut:
                folder.chmod(0o555)

    yield lock
    for folder in shut:
        folder.chmod(0o755)


@pytest.fixture
def on_a_disk(disk: Callable[..., Path], tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(root=str((disk(8 << 20) if os.geteuid() == 0 else tmp_path) / "store"))


def test_a_read_only_store_is_used_but_not_added_to(
    on_a_disk: ArtifactStore, locked: Callable[[ArtifactStore], None]
) -> None:
    store = on_a_disk
    folder = obtain(store)
    locked(store)
    whole = everything(store)
    # What is there can be had.
    assert obtain(store, refuse) == folder
    assert (folder / "table.txt").read_text(encoding="utf-8") == "0123456789"
    # What is not, cannot, and the work is not begun.
    for kind in ("reference", "other"):
        with pytest.raises(UserError) as caught:
            store.obtain(kind, artifact_key(kind, {}, {}, CODE), refuse, inputs={}, parameters={}, code=CODE)
        assert (caught.value.where, caught.value.field) == (store.root, "folder of the store")
        assert f"no permission to put an artifact ({kind}) there" in caught.value.found
        assert "CALIPERT_DATA" in caught.value.remedy
    assert everything(store) == whole


def test_a_store_that_cannot_be_made(disk: Callable[..., Path], on_a_disk: ArtifactStore, locked) -> None:
    Path(on_a_disk.root).mkdir()
    locked(on_a_disk)
    store = ArtifactStore(root=f"{on_a_disk.root}/below/store")
    with pytest.raises(UserError, match="folder of the store"):
        obtain(store, refuse)
    assert not Path(store.root).exists()


def test_a_damaged_artifact_in_a_read_only_store_is_not_used(
    on_a_disk: ArtifactStore, locked: Callable[[ArtifactStore], None]
) -> None:
    truncate(obtain(on_a_disk))
    locked(on_a_disk)
    with pytest.raises(UserError, match="folder of the store"):
        obtain(on_a_disk, refuse)


def test_a_preparation_into_a_read_only_store(
    screen: tuple[Path, DatasetSpec],
    on_a_disk: ArtifactStore,
    locked: Callable[[ArtifactStore], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CALIPERT_DATA", str(Path(on_a_disk.root).parent))
    obtain(on_a_disk)
    locked(on_a_disk)
    with pytest.raises(UserError) as caught:
        prepare(screen)
    assert (caught.value.where, caught.value.field) == (on_a_disk.root, "folder of the store")
    assert not (Path(on_a_disk.root) / "cells").exists()


def test_a_right_that_is_missing_elsewhere_is_not_blamed_on_the_store(store: ArtifactStore) -> None:
    def build(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/raw.h5ad")

    with pytest.raises(PermissionError, match=r"/somewhere/raw\.h5ad"):
        obtain(store, build)


# Damage


def truncate(folder: Path) -> None:
    rewrite(folder / "table.txt", b"01234")


def alter(folder: Path) -> None:
    rewrite(folder / "weights" / "layer.bin", b"\0" * 999 + b"\1")


def lose(folder: Path) -> None:
    (folder / "weights" / "layer.bin").unlink()


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def garble_manifest(folder: Path) -> None:
    rewrite(folder / "manifest.json", b'{"schema_version": 1, "ki')


def change_schema(folder: Path) -> None:
    change_manifest(folder, '"schema_version": 1', '"schema_version": 99')


def change_recipe(folder: Path) -> None:
    change_manifest(folder, '"seed": 42', '"seed": 43')


def change_manifest(folder: Path, old: str, new: str) -> None:
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    assert old in text
    rewrite(folder / "manifest.json", text.replace(old, new).encode())


def rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: "table.txt has 5 bytes, not 10",
    alter: "weights/layer.bin has changed",
    lose: "weights/layer.bin: No such file",
    lose_manifest: "no readable manifest",
    garble_manifest: "no readable manifest",
    change_schema: "schema 99",
    change_recipe: "another artifact",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_artifact_is_found_out_and_built_again(
    store: ArtifactStore, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = obtain(store)
    whole = everything(store)
    damage(folder)
    with caplog.at_level(logging.WARNING, "calipert.store"):
        assert obtain(store) == folder
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert DAMAGES[damage] in caplog.text
    assert everything(store) == whole
    assert obtain(store, refuse) == folder


def test_each_file_is_read_once_per_process_until_it_changes(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(file: Any, name: str) -> Any:
        read.append(Path(file.name).name)
        return file_digest(file, name)

    monkeypatch.setattr(blocks.store.checksums, "file_digest", counted)
    folder = obtain(store)
    assert sorted(read) == ["layer.bin", "table.txt"]
    obtain(store, refuse)
    assert len(read) == 2
    os.utime(folder / "table.txt", ns=(1, 1))
    obtain(store, refuse)
    assert read[2:] == ["table.txt"]


# Races


def test_the_loser_of_a_race_between_hosts_returns_the_winners_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    winner = obtain(ArtifactStore(root=str(tmp_path / "winner")))

    def build(folder: Path) -> None:
        (folder / "table.txt").write_text("the loser's", encoding="utf-8")
        shutil.copytree(winner, Path(store.root) / "reference" / KEY)

    folder = obtain(store, build)
    assert (folder / "table.txt").read_text(encoding="utf-8") == "0123456789"
    assert os.listdir(Path(store.root) / ".temporary") == []  # noqa: PTH208
    assert obtain(store, refuse) == folder


def test_a_winner_that_left_a_damaged_artifact_is_replaced(store: ArtifactStore, tmp_path: Path) -> None:
    winner = obtain(ArtifactStore(root=str(tmp_path / "winner")))
    truncate(winner)
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        write(folder)
        if len(calls) == 1:
            shutil.copytree(winner, Path(store.root) / "reference" / KEY)

    folder = obtain(store, build)
    assert (folder / "table.txt").read_text(encoding="utf-8") == "0123456789"
    assert len(calls) == 2


def test_threads_that_want_one_key_build_it_once(store: ArtifactStore) -> None:
    built: list[Path] = []
    got: list[Path] = []
    start = threading.Barrier(4)

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.3)
        write(folder)

    def ask() -> None:
        start.wait()
        got.append(obtain(ArtifactStore(root=store.root), build))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert got == [Path(store.root) / "reference" / KEY] * 4


BUILDER = """
import sys, time
from pathlib import Path
from blocks.store.artifacts import ArtifactStore, artifact_key
root, key, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])

def build(folder):
    (folder / "half.txt").write_text("half")
    with open(Path(root).parent / "built", "a") as log:
        log.write("once\\n")
    time.sleep(seconds)

recipe = dict(inputs={}, parameters={}, code="c0de")
print(ArtifactStore(root=root).obtain("slow", key, build, **recipe))
"""


def builder(store: ArtifactStore, key: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, store.root, key, str(seconds)]
    return subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_that_want_one_key_build_it_once(store: ArtifactStore, tmp_path: Path) -> None:
    key = artifact_key("slow", {}, {}, CODE)
    processes = [builder(store, key, 2) for _ in range(2)]
    answers = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert answers == {str(Path(store.root) / "slow" / key)}
    assert (tmp_path / "built").read_text(encoding="utf-8") == "once\n"


def test_a_killed_builder_frees_its_key_and_its_remains_are_removed(store: ArtifactStore, tmp_path: Path) -> None:
    key = artifact_key("slow", {}, {}, CODE)
    process = builder(store, key, 600)
    try:
        while not (tmp_path / "built").exists():
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    temporary = Path(store.root) / ".temporary"
    (left,) = (path for path in temporary.iterdir() if path.is_dir())
    assert (left / "slow" / key / "half.txt").exists()
    assert not (Path(store.root) / "slow").exists()
    # Of another host, whose builder may be at work.
    other = temporary / "artifact.elsewhere.abc"
    other.mkdir()
    (temporary / "artifact.elsewhere.abc.lock").touch()
    folder = store.obtain("slow", key, write, inputs={}, parameters={}, code=CODE)
    assert (folder / "table.txt").exists()
    assert not (folder / "half.txt").exists()
    assert sorted(temporary.iterdir()) == [other, temporary / "artifact.elsewhere.abc.lock"]
