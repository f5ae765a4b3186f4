"""The copy of the results where people look."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.score import publish_results


def results(folder: Path, text: str) -> Path:
    (folder / "figures").mkdir(parents=True)
    for name in ("report.html", "figures/one.svg"):
        (folder / name).write_text(text)
        (folder / name).chmod(0o444)
    return folder


def test_simultaneous_publications_leave_one_whole_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path / "data"))
    made = [results(tmp_path / str(number), str(number)) for number in range(2)]
    with ThreadPoolExecutor(4) as pool:
        pages = list(pool.map(lambda turn: publish_results.fn("screen", made[turn % 2]), range(40)))
    (page,) = set(pages)
    assert page == tmp_path / "data" / "reports" / "screen" / "report.html"
    assert page.read_text() == (page.parent / "figures" / "one.svg").read_text()
    assert [path.name for path in page.parents[1].iterdir() if not path.name.endswith(".lock")] == ["screen"]
