"""What is refused before any work: models that cannot be trained, names that predictions cannot have."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from core.errors import UserError
from tasks.inputs import BASELINES, check_model_name, chosen_models


def test_baselines_take_part_without_training() -> None:
    assert [model.name for model in chosen_models(["linear", "ridge_coexpression", "additive"])] == [
        "ridge_coexpression"
    ]
    assert chosen_models(BASELINES) == []


@pytest.mark.parametrize(("container", "found"), [(None, "none"), ("nowhere", "'nowhere', where there is no model")])
def test_a_model_without_a_program_is_refused(
    container: str | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "title": "t", "container": container}))
    monkeypatch.setenv("CALIPERT_CATALOG", str(tmp_path))
    with pytest.raises(UserError) as caught:
        chosen_models(["mine"])
    assert caught.value.found == found


@pytest.mark.parametrize("name", ["../escaped", "o'brien", "My Model", "", "dataset_mean", "linear"])
def test_names_that_predictions_cannot_have(name: str) -> None:
    with pytest.raises(UserError) as caught:
        check_model_name(name)
    assert caught.value.where == "--name"


def test_a_plain_name_is_taken() -> None:
    check_model_name("my_model_2")
