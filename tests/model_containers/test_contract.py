"""What the contract offers a model: the spec, the readers, the writers."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from model_containers import contract
from model_containers.contract import ContractError, Key

DESCRIPTION = contract.Description("toy", combinations=True, embedding=False, counts=False, gpu=False, input="cells")


def refuse(task: object) -> None:
    raise AssertionError("a stage that was not asked for")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in contract.THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")


def train_spec(folder: Path, **changes: object) -> Path:
    spec = {"cells": __file__, "embedding": None, "hyperparameters": {"k": 3}, "seed": 1, "threads": 1}
    path = folder / "spec.json"
    path.write_text(json.dumps(spec | {"output": str(folder / "output")} | changes))
    return path


def predict_spec(folder: Path, **changes: object) -> Path:
    spec = {"model": str(folder), "control": __file__, "seed": 1, "output": str(folder / "output")}
    path = folder / "spec.json"
    path.write_text(json.dumps(spec | {"conditions": [{"covariate": "a", "condition": "A+B"}]} | changes))
    return path


def test_train_gets_the_task_of_the_spec(tmp_path):
    tasks: list[contract.TrainTask] = []
    contract.main(DESCRIPTION, tasks.append, refuse, arguments=["train", str(train_spec(tmp_path))])
    output = tmp_path / "output"
    assert tasks == [contract.TrainTask(Path(__file__), None, {"k": 3}, 1, 1, output)]
    assert output.is_dir()


def test_predict_gets_the_task_of_the_spec_with_its_defaults(tmp_path):
    tasks: list[contract.PredictTask] = []
    contract.main(DESCRIPTION, refuse, tasks.append, arguments=["predict", str(predict_spec(tmp_path))])
    (task,) = tasks
    assert task.conditions == (Key("a", "A+B"),)
    assert (task.embedding, task.threads) == (None, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cells": "/nowhere.h5ad"}, "cells: wanted the path of something that exists; found '/nowhere.h5ad'"),
        ({"cells": None}, "cells: wanted the path of something that exists; found None"),
        ({"embedding": 3}, "embedding: wanted the path of something that exists; found 3"),
        ({"hyperparameters": []}, r"hyperparameters: wanted an object; found \[\]"),
        ({"seed": -1}, "seed: wanted a whole number, not negative; found -1"),
        ({"seed": 1.5}, "seed: wanted a whole number, not negative; found 1.5"),
        ({"seed": True}, "seed: wanted a whole number, not negative; found True"),
        ({"threads": 0}, "threads: wanted at least one thread; found 0"),
        ({"output": ""}, "output: wanted the path of a folder; found ''"),
        ({"colour": "red"}, "colour: unknown; train has cells, embedding, "),
    ],
)
def test_a_wrong_train_spec_is_refused_with_the_field(tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as ended:
        contract.main(DESCRIPTION, refuse, refuse, arguments=["train", str(train_spec(tmp_path, **changes))])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)
    assert "spec.json" in error


@pytest.mark.parametrize(
    "conditions",
    [
        "A",
        ["A"],
        [{"condition": "A"}],
        [{"covariate": "a", "condition": ""}],
        [{"covariate": "a", "condition": 1}],
        [{"covariate": "a", "condition": "control"}],
        [{"covariate": "a", "condition": "A"}] * 2,
        [{"covariate": "a", "condition": "A", "cells": 3}],
    ],
)
def test_wrong_conditions_are_refused(tmp_path, capsys, conditions):
    with pytest.raises(SystemExit):
        contract.main(
            DESCRIPTION, refuse, refuse, arguments=["predict", str(predict_spec(tmp_path, conditions=conditions))]
        )
    assert "conditions: wanted" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["train"], ["learn", "spec.json"], ["train", "a", "b"]])
def test_a_wrong_command_line_shows_the_right_one(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        contract.main(DESCRIPTION, refuse, refuse, arguments=arguments)
    assert ended.value.code == 2
    assert "wanted: describe|train|predict SPEC.json" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_spec_that_is_no_json_object_is_refused(tmp_path, capsys, content):
    path = tmp_path / "spec.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit):
        contract.main(DESCRIPTION, refuse, refuse, arguments=["train", str(path)])
    assert "spec.json" in capsys.readouterr().err


def test_threads_are_set_and_a_numpy_loaded_too_early_is_told(tmp_path, capsys):
    contract.main(DESCRIPTION, lambda task: None, refuse, arguments=["train", str(train_spec(tmp_path))])
    assert capsys.readouterr().out == ""
    contract.main(DESCRIPTION, lambda task: None, refuse, arguments=["train", str(train_spec(tmp_path, threads=3))])
    assert "numpy was loaded before its number of threads could be set to 3" in capsys.readouterr().out
    assert {os.environ[name] for name in contract.THREAD_VARIABLES} == {"3"}


def test_an_error_of_the_model_is_not_hidden(tmp_path):
    def train(task: contract.TrainTask) -> None:
        raise ZeroDivisionError("of the model")

    with pytest.raises(ZeroDivisionError):
        contract.main(DESCRIPTION, train, refuse, arguments=["train", str(train_spec(tmp_path))])


def test_embed_is_named_where_main_is_called():
    with pytest.raises(TypeError, match="positional"):
        # The wrong call is what is tested.
        contract.main(DESCRIPTION, refuse, refuse, ["describe", "spec.json"])  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize("field", ["name", "combinations", "embedding", "counts", "gpu", "input"])
def test_a_wrong_description_is_refused(field):
    fields = vars(DESCRIPTION) | {field: 0}
    with pytest.raises(ContractError, match=f"describe: {field}"):
        contract.Description(**fields)


def test_a_late_module_is_imported_when_it_is_first_used(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    late = contract.LateModule("colorsys")
    assert "colorsys" not in sys.modules
    assert late.rgb_to_hsv(1, 0, 0) == (0, 1, 1)


# ---- hyperparameters


@dataclass(frozen=True)
class Settings:
    k: int = 5
    rate: float = 0.5
    alphas: tuple[float, ...] = (0.1, 1.0)
    mode: str = "a"
    bias: bool = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError("k: wanted at least 1")


def settings(tmp_path: Path, **given: object) -> Settings:
    task = contract.TrainTask(tmp_path, None, dict(given), 1, 1, tmp_path)
    return contract.hyperparameters(task, Settings)


def test_hyperparameters_stand_beside_the_defaults(tmp_path):
    assert settings(tmp_path) == Settings()
    assert settings(tmp_path, rate=1, alphas=[1, 2.5]) == Settings(rate=1, alphas=(1, 2.5))


@pytest.mark.parametrize(
    "given",
    [
        {"q": 1},
        {"k": 2.5},
        {"k": True},
        {"k": "5"},
        {"k": 0},
        {"rate": "0.5"},
        {"rate": False},
        {"alphas": 1.0},
        {"alphas": ["a"]},
        {"mode": 1},
        {"bias": 1},
    ],
)
def test_wrong_hyperparameters_are_refused_by_name(tmp_path, given):
    with pytest.raises(ContractError, match=f"hyperparameters: {next(iter(given))}: "):
        settings(tmp_path, **given)


def test_a_maker_without_settings_refuses_any(tmp_path):
    contract.no_settings(contract.EmbedTask(tmp_path, {}, 1, tmp_path))
    with pytest.raises(ContractError, match="settings: k: unknown; there are none"):
        contract.no_settings(contract.EmbedTask(tmp_path, {"k": 1}, 1, tmp_path))


def test_the_only_file_is_the_one_whose_name_fits(tmp_path):
    for name in ("a.txt", "b.txt", "c.tsv"):
        (tmp_path / name).touch()
    assert contract.only_file(tmp_path, "*.tsv") == tmp_path / "c.tsv"
    for pattern, count in (("*.txt", 2), ("*.h5", 0)):
        with pytest.raises(ContractError, match=rf"{count} files \{pattern}; wanted one"):
            contract.only_file(tmp_path, pattern)


# ---- events


def test_events_are_json_lines(capsys):
    contract.progress(cast(Any, np.int64(1)), 2, "epoch")
    contract.metric("loss", 1, cast(Any, np.float32(0.5)))
    contract.log("two\nlines")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"event": "progress", "done": 1, "total": 2, "unit": "epoch"},
        {"event": "metric", "name": "loss", "step": 1, "value": 0.5},
        {"event": "log", "message": "two\nlines"},
    ]


# ---- reading


@pytest.fixture
def cells(tmp_path) -> ad.AnnData:
    rng = np.random.default_rng(3)
    X = sparse.random(50, 8, 0.4, format="csr", dtype=np.float32, rng=rng)
    obs = pd.DataFrame(
        {
            "covariate": rng.choice(["x", "y"], 50),
            "condition": pd.Categorical(rng.choice(["control", "A", "B+C"], 50)),
            "split": rng.choice(["train", "val"], 50, p=[0.8, 0.2]),
            "batch": 1,
        },
        index=[f"c{row}" for row in range(50)],
    )
    cells = ad.AnnData(X, obs=obs, var=pd.DataFrame({"n": 1}, index=[f"g{column}" for column in range(8)]))
    cells.layers["counts"] = X.ceil() * 10
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return cells


def test_cells_are_read_with_the_columns_of_the_contract(cells, tmp_path):
    read = contract.read_cells(tmp_path / "cells.h5ad")
    assert list(read.obs) == ["covariate", "condition", "split"]
    assert list(read.layers) == []
    assert (read.X != cells.X).nnz == 0
    assert read.X.dtype == np.float32
    assert contract.read_cells(tmp_path / "cells.h5ad", counts=True).layers["counts"].max() == 10


def test_missing_counts_and_columns_are_named(cells, tmp_path):
    del cells.layers["counts"], cells.obs["split"]
    cells.write_h5ad(tmp_path / "bare.h5ad")
    with pytest.raises(ContractError, match="no layers/counts"):
        contract.read_cells(tmp_path / "bare.h5ad", counts=True)
    for read in (contract.read_cells, contract.read_means):
        with pytest.raises(ContractError, match="obs has no column split"):
            read(tmp_path / "bare.h5ad")


@pytest.mark.parametrize("block", [7, 65_536])
@pytest.mark.parametrize("dense", [False, True])
def test_means_are_those_of_the_cells_whatever_the_block(cells, tmp_path, monkeypatch, block, dense):
    if dense:
        cells.X = cells.X.toarray()
        cells.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setattr(contract, "BLOCK_OF_CELLS", block)
    means = contract.read_means(tmp_path / "cells.h5ad")
    names = ["covariate", "condition", "split"]
    labels = cells.obs[names].astype(str)
    expected = cells.to_df().astype(float).groupby([labels[name] for name in names]).mean()
    assert means.obs.set_index(names).index.tolist() == expected.index.tolist()
    np.testing.assert_allclose(means.X, expected.to_numpy(), rtol=1e-14)
    assert means.X.dtype == np.float64
    assert means.obs["n_cells"].tolist() == labels.value_counts(sort=False).sort_index().tolist()
    assert means.var_names.equals(cells.var_names)


def test_dataset_mean_weighs_each_train_perturbation_the_same():
    rows = [("x", "A", "train", 1), ("x", "B", "train", 100), ("x", "C", "val", 9), ("x", "control", "train", 50)]
    rows += [("y", "A", "train", 3), ("z", "A", "val", 3)]
    obs = pd.DataFrame(rows, columns=["covariate", "condition", "split", "n_cells"])
    X = np.array([[1.0, 2], [3, 6], [70, 70], [50, 50], [9, 9], [8, 8]])
    means = ad.AnnData(X, obs=obs.set_index(obs.index.astype(str)), var=pd.DataFrame(index=["g", "h"]))
    expected = pd.DataFrame({"g": [2.0, 9.0], "h": [4.0, 9.0]}, index=["x", "y"])
    pd.testing.assert_frame_equal(contract.dataset_means(means), expected, check_names=False)


def write_embedding(path: Path, **genes: list[float]) -> Path:
    pd.DataFrame.from_dict(genes, orient="index", columns=["d0", "d1"]).astype(np.float32).to_parquet(path)
    return path


def test_an_embedding_of_zeros_is_none(tmp_path):
    table = contract.read_embedding(write_embedding(tmp_path / "e.parquet", A=[3, 4], B=[0, 0], C=[-1, 0]))
    assert table.index.tolist() == ["A", "C"]
    assert (table.dtypes == np.float64).all()
    np.testing.assert_allclose(contract.unit_norm(table), [[0.6, 0.8], [-1.0, 0.0]], rtol=1e-15)


def test_an_embedding_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(ContractError, match="names none"):
        contract.read_embedding(None)
    with pytest.raises(ContractError, match="gene B has a value that is not finite"):
        contract.read_embedding(write_embedding(tmp_path / "e.parquet", A=[3, 4], B=[0, np.nan]))
    path = write_embedding(tmp_path / "e.parquet", A=[3, 4], B=[1, 0])
    with pytest.raises(ContractError, match="2 dimensions; the model was trained with 3"):
        contract.read_embedding(path, 3)
    pd.read_parquet(path).rename(index={"B": "A"}).to_parquet(path)
    with pytest.raises(ContractError, match="gene A occurs more than once"):
        contract.read_embedding(path)


def test_what_cannot_be_predicted_has_its_reason():
    embedding = pd.DataFrame({"d0": [1.0, 2.0]}, index=["A", "B"])
    keys = [Key("x", "A+B"), Key("x", "A+C+D"), Key("y", "A"), Key("y", "C")]
    assert contract.unpredictable(keys, embedding, ["x"]) == {
        Key("x", "A+C+D"): "no embedding for C, D",
        Key("y", "A"): "covariate y has no training perturbation with an embedding",
        Key("y", "C"): "no embedding for C",
    }
    assert contract.is_embedded("A+B", embedding)
    assert not contract.is_embedded("A+C", embedding)
    assert not contract.is_embedded("control", embedding)


def test_genes_of_conditions_are_marked_and_their_embeddings_summed():
    embedding = pd.DataFrame({"d0": [1.0, 2.0, 4.0], "d1": [0.0, 1.0, 1.0]}, index=["A", "B", "C"])
    conditions = ["control", "B", "A+C"]
    assert contract.genes_in([Key("x", name) for name in conditions]) == ["A", "B", "C"]
    marks = contract.mark_genes(conditions, ["C", "B"])
    assert marks.tolist() == [[False, False], [False, True], [True, False]], "A is not asked for"
    assert contract.sum_embeddings(conditions, embedding).tolist() == [[0, 0], [2, 1], [5, 1]]
    known = contract.perturb_known(pd.Series([*conditions, "A+D"]), embedding.index)
    assert known.tolist() == [False, True, True, False]


def test_rows_of_cells_are_found_by_condition_and_covariate():
    obs = pd.DataFrame({"covariate": ["x", "y", "x"], "condition": ["A", "A", "B"]})
    assert contract.keys_of(obs) == [Key("x", "A"), Key("y", "A"), Key("x", "B")]
    assert contract.rows_among([Key("x", "B"), Key("x", "A")], obs).tolist() == [1, -1, 0]


def test_the_first_reason_why_a_condition_is_not_predicted_is_given():
    known = {"unmeasured:": {"A", "B"}, "far:": {"A"}}
    keys = [Key("x", "A"), Key("x", "B"), Key("y", "B+C"), Key("y", "A")]
    assert contract.find_gaps(keys, known, ["x"], "is new") == {
        Key("x", "B"): "far: B",
        Key("y", "B+C"): "unmeasured: C",
        Key("y", "A"): "covariate y is new",
    }


def test_numbers_of_settings_are_above_0_or_at_least_0():
    @dataclass
    class Numbers:
        k: float = 1
        decay: float = 0
        share: float = -1

    for given, message in (({"k": 0}, "k: wanted a number above 0"), ({"decay": -1}, "decay: wanted a number of at")):
        with pytest.raises(ValueError, match=message):
            contract.check_numbers(Numbers(**given), or_zero=("decay",), others=("share",))
    contract.check_numbers(Numbers(), or_zero=("decay",), others=("share",))


# ---- writing


def predict_task(output: Path, *keys: Key) -> contract.PredictTask:
    return contract.PredictTask(output, output, keys, None, 1, 1, output)


def test_predictions_are_written_sorted(tmp_path):
    keys = [Key("y", "A"), Key("x", "B"), Key("x", "A+B")]
    task = predict_task(tmp_path, *keys, Key("x", "C"))
    profiles = np.arange(6, dtype=np.float32).reshape(3, 2)
    contract.write_predictions(task, keys, profiles, pd.Index(["g", "h"]), {Key("x", "C"): "why"})
    written = ad.read_h5ad(tmp_path / "predictions.h5ad")
    assert written.obs_names.tolist() == ["x|A+B", "x|B", "y|A"]
    assert written.obs["condition"].tolist() == ["A+B", "B", "A"]
    assert written.X.tolist() == [[4, 5], [2, 3], [0, 1]]
    assert written.X.dtype == np.float64
    unpredicted = json.loads((tmp_path / "unpredicted.json").read_text())
    assert unpredicted == [{"covariate": "x", "condition": "C", "reason": "why"}]


def test_no_prediction_at_all_is_an_answer(tmp_path):
    key = Key("x", "A")
    contract.write_predictions(predict_task(tmp_path, key), [], np.empty((0, 2)), ["g", "h"], {key: "why"})
    assert ad.read_h5ad(tmp_path / "predictions.h5ad").shape == (0, 2)


@pytest.mark.parametrize(
    ("keys", "profiles", "unpredicted", "message"),
    [
        ([Key("x", "A")], [[1.0, 2.0]], {}, "exactly once"),
        ([Key("x", "A"), Key("x", "B")], [[1.0, 2.0]] * 2, {Key("x", "B"): "why"}, "exactly once"),
        ([Key("x", "A"), Key("x", "C")], [[1.0, 2.0]] * 2, {Key("x", "B"): "why"}, "exactly once"),
        ([Key("x", "A"), Key("x", "B")], [[1.0, 2.0]], {}, "values for 2 keys x 2 genes"),
        ([Key("x", "A"), Key("x", "B")], [[1.0], [2.0]], {}, "values for 2 keys x 2 genes"),
        ([Key("x", "A"), Key("x", "B")], [[1.0, 2.0], [1.0, np.nan]], {}, "B, gene h: nan"),
    ],
    ids=["one left out", "one twice", "one not asked", "rows", "columns", "NaN"],
)
def test_a_breach_of_the_contract_is_refused(tmp_path, keys, profiles, unpredicted, message):
    task = predict_task(tmp_path, Key("x", "A"), Key("x", "B"))
    with pytest.raises(ContractError, match=message):
        contract.write_predictions(task, keys, np.array(profiles), ["g", "h"], unpredicted)
    assert not (tmp_path / "predictions.h5ad").exists()
