"""The memory that the preparation may take, from the environment."""

from __future__ import annotations

import pytest

from blocks.config.limits import VARIABLE, chunk_memory
from core.errors import UserError


@pytest.mark.parametrize(("text", "expected"), [(None, 2_000_000_000), ("0.5", 500_000_000), ("16", 16_000_000_000)])
def test_gigabytes(text: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(VARIABLE, text)
    assert chunk_memory() == expected


@pytest.mark.parametrize("text", ["", "2 GB", "0", "-1", "nan", "inf", "0.001"])
def test_what_is_no_amount_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(UserError, match=VARIABLE) as error:
        chunk_memory()
    assert repr(text) in error.value.found
