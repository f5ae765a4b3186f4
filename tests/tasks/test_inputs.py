"""What is refused before any work: models that cannot be trained, names that predictions cannot have, mirrors."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from blocks.config.catalog import open_catalog
from core.errors import UserError
from tasks import preflight
from tasks.inputs import (
    BASELINES,
    check_model_name,
    choose_dataset,
    choose_models,
    choose_study,
    list_inputs,
    list_study,
    resolve_sources,
)
from tests.helpers.entries import STUDY


def test_baselines_take_part_without_training() -> None:
    assert [model.name for model in choose_models(["linear", "ridge_coexpression", "additive"])] == [
        "ridge_coexpression"
    ]
    assert choose_models(BASELINES) == []


@pytest.mark.parametrize(
    ("container", "found"), [(None, "none"), ("nowhere", "'nowhere', of which there is no model.py")]
)
def test_a_model_without_a_program_is_refused(
    container: str | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "title": "t", "container": container}))
    monkeypatch.setenv("CALIPERT_CATALOG", str(tmp_path))
    with pytest.raises(UserError) as caught:
        choose_models(["mine"])
    assert caught.value.found == found


@pytest.mark.parametrize("name", ["../escaped", "o'brien", "My Model", "", "dataset_mean", "linear"])
def test_names_that_predictions_cannot_have(name: str) -> None:
    with pytest.raises(UserError) as caught:
        check_model_name(name)
    assert caught.value.where == "--name"


def test_a_plain_name_is_taken() -> None:
    check_model_name("my_model_2")


def test_the_origin_decides_the_source_and_nothing_else() -> None:
    entry = open_catalog().dataset("norman19")
    assert choose_dataset("norman19", origin="raw") == entry
    mirrored = choose_dataset("norman19", origin="mirror")
    assert mirrored.source == entry.mirror
    assert mirrored.model_copy(update={"source": entry.source}) == entry


def test_a_mirror_that_an_entry_has_not_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        choose_dataset("papalexi21", origin="mirror")
    assert (caught.value.where, caught.value.field) == ("catalog entry papalexi21", "mirror")
    assert "origin raw" in caught.value.remedy


def test_a_mirror_has_its_own_folds() -> None:
    with pytest.raises(UserError) as caught:
        choose_dataset("replogle22rpe1", 3, "mirror")
    assert (caught.value.where, caught.value.found) == ("--folds", "3, with origin mirror")


def test_the_study_is_reproduced_unless_data_sets_are_named() -> None:
    assert list_study() == STUDY
    assert list(choose_study([], "mirror")) == STUDY
    assert list(choose_study(["demo", "norman19"], "raw")) == ["demo", "norman19"]


def test_a_data_set_without_its_file_can_still_be_asked_for() -> None:
    specs = choose_study(["papalexi21_panel"], "raw")
    assert list(specs) == ["papalexi21_panel"]
    assert resolve_sources([], {"papalexi21_panel": "/no/such.h5ad"}, later=specs.values()) == {}


@pytest.mark.parametrize(
    ("datasets", "models", "sources", "found"),
    [
        (["dmeo"], [], {}, "'dmeo', which is not known"),
        (["papalexi21"], [], {}, "none, but the origin is to be mirror"),
        (["norman19"], ["ridge_reactom"], {}, "'ridge_reactom', which is not known"),
        (["norman19"], [], {"demo": "x.h5ad"}, "'demo' takes no part in this run"),
        (["norman19"], ["ridge_reactome"], {"reactome": "/no/such.gmt"}, "no such file"),
    ],
)
def test_a_request_that_no_data_set_can_fulfil_is_refused(
    datasets: list[str], models: list[str], sources: dict[str, str], found: str
) -> None:
    with pytest.raises(UserError) as caught:
        resolve_sources(list_inputs(choose_models(models)), sources, later=choose_study(datasets, "mirror").values())
    assert caught.value.found == found


@pytest.mark.parametrize(("sources", "checked"), [({"ncbi_genes": "nowhere"}, False), ({}, True)])
def test_keys_are_asked_for_only_with_the_files_known(
    sources: dict[str, str], checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(preflight, "check_services", lambda specs, files: asked.append(files))
    with pytest.raises(UserError, match="ncbi_genes") if sources else nullcontext():
        preflight.check_needs([open_catalog().pretrained("ncbi_genes")], sources, [])
    assert bool(asked) is checked
