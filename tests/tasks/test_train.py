"""What a training may not do behind the benchmark's back."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocks.config.catalog import open_catalog
from core.errors import UserError
from tasks import engine, train


class Changing:
    """An engine whose models are others each time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def identity(self, folder: Path) -> str:
        self.asked += 1
        return f"{folder.name} {self.asked}"


def test_a_model_that_changes_while_the_flow_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, changing = engine.find_container_of(open_catalog().model("ridge_reactome")), Changing()
    engine.require_unchanged(model)
    engine.identify_container.cache_clear()
    monkeypatch.setattr(engine, "choose_engine", lambda: changing)
    engine.identify_container(model)
    with pytest.raises(UserError, match="changed while the flow runs"):
        engine.require_unchanged(model)
    engine.identify_container.cache_clear()


@pytest.mark.parametrize("name", ["usage.json", "manifest.json"])
def test_a_model_may_not_write_what_is_written_beside_its_output(tmp_path: Path, name: str) -> None:
    train._require_free(tmp_path, "ridge")
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=name):
        train._require_free(tmp_path, "ridge")
