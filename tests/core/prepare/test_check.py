"""What an entry would do with a file agrees with what the preparation does, and is told without reading counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import pytest

from core.catalog.schema import DatasetSpec
from core.errors import UserError
from core.prepare.check import check_dataset

Entry = Callable[..., DatasetSpec]
Prepare = Callable[..., ad.AnnData]


def test_it_tells_what_the_preparation_does(
    prepared: Prepare, single_raw: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    raw = single_raw.copy()
    raw.obs["perturbation"] = raw.obs["perturbation"].astype(str) + "_guide"
    raw.obs.loc[raw.obs["perturbation"] == "control_guide", "perturbation"] = "NT"
    raw.write_h5ad(tmp_path / "raw.h5ad")
    spec = entry(
        labels={"column": "perturbation", "control": ["NT"], "cut_at": "_"},
        min_genes_per_cell=0,
        min_cells_per_gene=0,
        min_cells_per_condition=22,
    )
    check = check_dataset(tmp_path / "raw.h5ad", spec)
    cells = prepared(raw, spec, "raw")
    report = json.loads(cells.uns["preparation"])
    dropped = check.conditions.loc[~check.conditions["kept"]]
    assert [f"all {name}" for name in dropped["condition"]] == report["conditions dropped for too few cells"] != []
    assert set(check.conditions.loc[check.conditions["kept"], "condition"]) == set(cells.obs["condition"])
    assert check.conditions["cells"].sum() == check.labels["cells"].sum() == raw.n_obs
    assert dict(zip(check.labels["condition"], check.labels["label"], strict=True))["control"] == "NT"
    kept_too = set(check.report["perturbed genes that are not measured"]) - set(dropped["condition"])
    assert sorted(kept_too) == report["perturbed genes that are not measured"]
    same = [what for what in check.report if what != "perturbed genes that are not measured"]
    assert "control labels that are also measured genes" in same
    for what in same:
        assert check.report[what] == report[what]
    assert check.faults == []


def test_it_names_what_would_be_refused(single_raw: ad.AnnData, pairs_raw: ad.AnnData, entry: Entry, tmp_path: Path):
    single_raw.write_h5ad(tmp_path / "single.h5ad")
    pairs_raw.write_h5ad(tmp_path / "pairs.h5ad")
    assert "10 are needed" in check_dataset(tmp_path / "single.h5ad", entry(min_cells_per_condition=500)).faults[0]
    assert "task: single" in check_dataset(tmp_path / "pairs.h5ad", entry()).faults[0]
    assert "2 are needed" in check_dataset(tmp_path / "single.h5ad", entry(task="combination")).faults[0]


def test_a_file_that_is_none_is_refused(entry: Entry, tmp_path: Path) -> None:
    (tmp_path / "notes.h5ad").write_text("not an h5ad")
    with pytest.raises(UserError, match="not a readable h5ad"):
        check_dataset(tmp_path / "notes.h5ad", entry())
    with pytest.raises(UserError, match="no such file"):
        check_dataset(tmp_path / "absent.h5ad", entry())


def test_of_a_mirror_it_tells_what_is_in_it(
    mirror: ad.AnnData, pairs_cells: ad.AnnData, entry: Entry, tmp_path: Path
) -> None:
    mirror.write_h5ad(tmp_path / "mirror.h5ad")
    check = check_dataset(tmp_path / "mirror.h5ad", entry(task="combination", min_cells_per_condition=10_000))
    assert check.conditions["kept"].all()
    found = check.conditions.set_index("condition")["cells"].to_dict()
    assert found == pairs_cells.obs["condition"].value_counts().to_dict()
    assert (check.labels["label"] == check.labels["condition"]).all()
    assert check.report["synthetic control cells left out"] == 5
    assert check.faults == []
