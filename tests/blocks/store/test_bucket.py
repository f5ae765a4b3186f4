"""How the parts of a download run together. The bucket itself is in tests/platform/blocks/test_bucket.py."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blocks.store import bucket
from blocks.store.bucket import ObjectStore
from tests.helpers.waiting import wait_for


class Ended(Exception):
    """What ends a download."""


def fail() -> None:
    """Raise in a part."""
    raise Ended


def cancel() -> None:
    """Raise in the thread that waits for the parts, as Prefect does when a task is over its time or cancelled."""
    caller = threading.main_thread().ident
    assert caller is not None
    time.sleep(0.1)  # once it waits
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(caller), ctypes.py_object(Ended))


@pytest.mark.parametrize("end", [fail, cancel])
def test_an_error_or_a_cancellation_is_heard_while_the_first_part_goes_on(
    monkeypatch: pytest.MonkeyPatch, end: Callable[[], None]
) -> None:
    begun: list[int] = []

    def download(_: ObjectStore, path: Path, place: str, start: int, size: int) -> None:
        begun.append(start)
        if start == 0:
            wait_for(lambda: len(begun) == size, 1)
        elif start == 1:
            end()
        else:
            time.sleep(0.05)

    monkeypatch.setattr(bucket, "PARTS", 2)
    monkeypatch.setattr(bucket, "WAIT_S", 0.05)
    monkeypatch.setattr(ObjectStore, "_download", download)
    with pytest.raises(Ended):
        ObjectStore("s3://bucket")._download_parts((Path("file"), "place", start, 20) for start in range(20))
    assert len(begun) < 20
