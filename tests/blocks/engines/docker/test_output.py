"""What comes out of a container: plain files and folders below its output, and nothing else."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from blocks.engines.docker.output import RefusedOutput, move_into, read_members, repack, unpack


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


OUTPUT = member("output", type=tarfile.DIRTYPE, mode=0o1777)


def archived(*given: tuple[tarfile.TarInfo, bytes]) -> list[bytes]:
    """A tar, in pieces."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for info, content in given:
            archive.addfile(info, io.BytesIO(content))
    data = whole.getvalue()
    return [data[start : start + 700] for start in range(0, len(data), 700)]


def unpacked(folder: Path, *given: tuple[tarfile.TarInfo, bytes], most_bytes: int = 1000, most_files: int = 3) -> None:
    unpack(read_members(archived(*given), "/output", most_bytes, most_files), folder)


def test_plain_files_and_folders_come_with_their_content_alone(tmp_path):
    weights = bytes(range(250)) * 3
    unpacked(
        tmp_path,
        OUTPUT,
        member("output/deep", type=tarfile.DIRTYPE, mode=0),
        member("output/deep/weights", weights, mode=0o6777, mtime=1, uid=0),
    )
    path = tmp_path / "deep" / "weights"
    assert path.read_bytes() == weights
    assert path.stat().st_mode & 0o7111 == 0
    assert path.stat().st_mtime > 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            member("output/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "'output/link', which is a symbolic link",
        ),
        (member("output/link", type=tarfile.LNKTYPE, linkname="output/a"), "which is a hard link"),
        (member("output/pipe", type=tarfile.FIFOTYPE), "which is a pipe"),
        (member("output/null", type=tarfile.CHRTYPE), "which is a device"),
        (member("output/disk", type=tarfile.BLKTYPE), "which is a device"),
        (member("output/other", type=b"Z"), "no plain file"),
        (member("/etc/cron.d/x", b"x"), "a name that leads elsewhere"),
        (member("output/../../x", b"x"), "a name that leads elsewhere"),
        (member("x", b"x"), "a name that leads elsewhere"),
        (member("output/" + "x/" * 600), "a path of more than 1024 bytes"),
        (member("output/big", bytes(1001)), "more than 1,000 bytes, at 'output/big'"),
    ],
)
def test_everything_else_is_refused(tmp_path, bad, words):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(RefusedOutput, match=words):
        unpacked(folder, OUTPUT, bad)
    assert list(tmp_path.iterdir()) == [folder]
    assert list(folder.iterdir()) == []


def test_too_many_files_are_refused(tmp_path):
    three = [member(f"output/{number}") for number in range(3)]
    unpacked(tmp_path, OUTPUT, *three)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(RefusedOutput, match="more than 3 files"):
        unpacked(tmp_path, OUTPUT, *three, member("output/3"))


def test_a_file_twice_is_an_error(tmp_path):
    with pytest.raises(FileExistsError):
        unpacked(tmp_path, OUTPUT, member("output/a", b"1"), member("output/a", b"2"))


def test_what_is_no_archive_is_refused(tmp_path):
    with pytest.raises(RefusedOutput, match="no readable archive"):
        unpack(read_members([b"x" * 1000], "/output", 1000, 3), tmp_path)


@pytest.mark.parametrize("again", [unpack, lambda found, folder: repack(found, folder / "tar", 1, 1)])
def test_what_breaks_off_in_the_midst_of_a_file_is_refused(tmp_path, again):
    broken = archived(OUTPUT, member("output/a", b"x" * 900))[:2]
    with pytest.raises(RefusedOutput, match="no readable archive"):
        again(read_members(broken, "/output", 1000, 3), tmp_path)


def test_what_is_packed_again_is_a_users_and_nothing_but_content(tmp_path):
    strange = "place/deep/\udcff\n" + "é" * 100
    given = [
        member("place", type=tarfile.DIRTYPE, mode=0),
        member("place/deep", type=tarfile.DIRTYPE, mode=0),
        member(strange, b"weights", mode=0o6777, mtime=1, uid=0, uname="root"),
    ]
    repack(read_members(archived(*given), "/place", 1000, 3), tmp_path / "tar", 7, 8)
    with tarfile.open(tmp_path / "tar") as archive:
        found = archive.getmembers()
        assert [(one.name, one.uid, one.gid, one.uname) for one in found] == [
            ("deep", 7, 8, ""),
            (strange.removeprefix("place/"), 7, 8, ""),
        ]
        assert [one.mode for one in found] == [0o755, 0o644]
        assert archive.extractfile(found[1]).read() == b"weights"


def test_a_name_that_is_there_is_not_replaced(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    for folder in (source, output):
        folder.mkdir()
    (source / "a").write_text("model's")
    (source / "training.jsonl").write_text("model's")
    (output / "training.jsonl").symlink_to("nowhere")
    with pytest.raises(RefusedOutput, match=r"'training\.jsonl', a name that the benchmark uses"):
        move_into(source, output)
    assert not (output / "a").exists()
    (output / "training.jsonl").unlink()
    move_into(source, output)
    assert (output / "a").read_text() == (output / "training.jsonl").read_text() == "model's"
