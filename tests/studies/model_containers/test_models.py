"""The contract's tests, which any model folder passes."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pytest

from blocks.engines.base import Stage
from blocks.engines.lines import Event
from blocks.engines.process import ProcessEngine
from core.errors import UserError
from model_containers import contract

MODELS = Path(contract.__file__).parent
NAMES = sorted(path.parent.name for path in MODELS.glob("*/model.py"))


def pins(requirements: Path) -> dict[str, str]:
    """Package -> version."""
    return dict(line.split("==") for line in requirements.read_text().splitlines() if "==" in line)


CONSTRAINTS = pins(MODELS.parent / "constraints.txt")
# Folders that make embeddings, and train nothing, by what they say of themselves.
MAKERS = [name for name in NAMES if runpy.run_path(str(MODELS / name / "model.py"))["DESCRIPTION"].input == "files"]
# A model of packages that are none of the project's runs in its image alone.
IN_IMAGE = [name for name in NAMES if not set(pins(MODELS / name / "requirements.txt")) <= set(CONSTRAINTS)]
# Few epochs: what the contract asks does not depend on how good a model is.
HYPERPARAMETERS = {
    "fmlp": {"epochs": 4, "validate_every": 2, "hidden": 32, "latent": 8, "batch_size": 64},
    "gears": {"epochs": 2, "hidden": 8},
    "presage": {"epochs": 4, "item_hidden": 16, "source_hidden": 8, "batch_size": 8},
    "sclambda": {"epochs": 4, "validate_every": 2, "hidden": 32, "latent": 8, "batch_size": 64},
    "scgpt": {"width": 16, "heads": 2, "layers": 1, "hidden": 16, "epochs": 2, "sequence": 20, "pool": 8},
}
# What else than the embedding a model is told of genes: the file, and what it says of a gene that is not there.
KNOWLEDGE = {"gears": ("graph.parquet", "no GO neighbours for")}


def command(name: str, stage: str, spec: Path, threads: int = 1) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(MODELS),
        "PYTHONHASHSEED": str(threads),
        **dict.fromkeys(contract.THREAD_VARIABLES, str(threads)),
    }
    return subprocess.run(
        [sys.executable, str(MODELS / name / "model.py"), stage, str(spec)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


def write_spec(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps(fields, default=str))
    return path


@pytest.fixture(autouse=True, scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A data folder of the tests' own: the engine keeps its scratch there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALIPERT_DATA", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="module", params=[name for name in NAMES if name not in {*IN_IMAGE, *MAKERS}])
def trained(request, two_lines, tmp_path_factory) -> SimpleNamespace:
    """A model trained and asked in two environments of other threads and hash seed; on one the rows asked turned."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    before = contents(two_lines.folder)
    file, reason = KNOWLEDGE.get(name, ("embedding.parquet", "no embedding for"))
    runs = {}
    for threads in (1, 2):
        model, output = folder / f"model_{threads}", folder / f"output_{threads}"
        told = {"embedding": two_lines.folder / file}
        task = two_lines.train_task(model, hyperparameters=HYPERPARAMETERS.get(name, {}), **told)
        train = command(name, "train", write_spec(folder / "train.json", **vars(task)), threads)
        assert train.returncode == 0, train.stderr
        asked = [key._asdict() for key in two_lines.held_out][:: 1 if threads == 1 else -1]
        task = two_lines.predict_task(model, output, conditions=asked, **told)
        predict = command(name, "predict", write_spec(folder / "predict.json", **vars(task)), threads)
        assert predict.returncode == 0, predict.stderr
        runs[threads] = SimpleNamespace(model=model, output=output, stdout=train.stdout + predict.stdout)
    assert contents(two_lines.folder) == before, "a model writes into its output only"
    description = ProcessEngine().describe(MODELS / name)
    return SimpleNamespace(name=name, description=description, panel=two_lines, runs=runs, reason=reason)


@pytest.mark.parametrize("name", NAMES)
def test_description_fits_the_folder_and_is_quick(name, tmp_path):
    """Quick: nothing heavy is imported for it."""
    spec = write_spec(tmp_path / "spec.json", output=tmp_path)
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
        "assert not {'numpy', 'pandas', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(MODELS / name / "model.py"), "describe", str(spec)],
        env=os.environ | {"PYTHONPATH": str(MODELS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert contract.Description(**json.loads((tmp_path / "describe.json").read_text())).name == name


def test_bytes_depend_on_neither_threads_nor_hash_seed_nor_order_of_the_conditions(trained):
    one, two = trained.runs[1], trained.runs[2]
    assert contents(one.model) == contents(two.model)
    assert contents(one.output) == contents(two.output)
    assert set(contents(one.output)) == {"predictions.h5ad", "unpredicted.json"}


def test_every_asked_condition_is_predicted_or_has_a_reason(trained):
    predictions = ad.read_h5ad(trained.runs[1].output / "predictions.h5ad")
    assert predictions.var_names.equals(ad.read_h5ad(trained.panel.folder / "train.h5ad").var_names)
    assert np.isfinite(predictions.X).all()
    predicted = list(map(contract.Key, predictions.obs["covariate"], predictions.obs["condition"]))
    assert predicted == sorted(set(predicted))
    unpredicted = json.loads((trained.runs[1].output / "unpredicted.json").read_text())
    reasons = {contract.Key(row["covariate"], row["condition"]): row["reason"] for row in unpredicted}
    assert sorted([*predicted, *reasons]) == sorted(trained.panel.held_out)
    assert all(reasons.values())


def test_only_what_a_model_cannot_know_is_left_unpredicted(trained):
    unpredicted = json.loads((trained.runs[1].output / "unpredicted.json").read_text())
    left_out = {(row["covariate"], row["condition"]): row["reason"] for row in unpredicted}
    expected = {("unseen", "P03")}
    if trained.description.embedding:
        expected |= {("K562", "P10"), ("K562", "P00+P11")}
        assert left_out["K562", "P10"] == f"{trained.reason} P10"
        assert left_out["K562", "P00+P11"] == f"{trained.reason} P11"
    if not trained.description.combinations:
        expected |= {tuple(key) for key in trained.panel.held_out if "+" in key.condition}
    assert set(left_out) == expected


def test_stdout_is_events_and_progress_reaches_its_end(trained):
    events = [json.loads(line) for line in trained.runs[1].stdout.splitlines()]
    assert {event["event"] for event in events} <= {"progress", "metric", "log"}
    done = [event for event in events if event["event"] == "progress"]
    assert done[-1]["done"] == done[-1]["total"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MAKERS])
def test_a_wrong_hyperparameter_is_named(name, panel, tmp_path):
    task = panel.train_task(tmp_path / "model", hyperparameters={"colour": "red"})
    done = command(name, "train", write_spec(tmp_path / "spec.json", **vars(task)))
    assert done.returncode == 2
    assert re.fullmatch(r"error: hyperparameters: colour: unknown; there are .*\n", done.stderr)


@pytest.mark.parametrize("name", MAKERS)
def test_a_wrong_setting_of_an_embedding_is_named(name, tmp_path):
    task = {"pretrained": tmp_path, "settings": {"colour": "red"}, "output": tmp_path / "output"}
    done = command(name, "embed", write_spec(tmp_path / "spec.json", **task))
    assert done.returncode == 2
    assert re.fullmatch(r"error: settings: colour: unknown; there are .*\n", done.stderr)


@pytest.mark.parametrize("name", NAMES)
def test_build_folder_is_whole(name):
    folder = MODELS / name
    assert {"Dockerfile", "README.md", "model.py", "requirements.txt"} <= {path.name for path in folder.iterdir()}
    lines = (folder / "requirements.txt").read_text().splitlines()
    found = pins(folder / "requirements.txt")
    assert len(found) == len(lines), "all are pinned, and once"
    if name not in IN_IMAGE:
        assert found.items() <= CONSTRAINTS.items()
    dockerfile = (folder / "Dockerfile").read_text()
    assert dockerfile.startswith("ARG BASE_IMAGE=python:3.11-slim\nFROM ${BASE_IMAGE}\n")
    for source in re.findall(r"^COPY (\S+(?: \S+)*) \S+$", dockerfile, flags=re.MULTILINE):
        for path in source.split():
            assert (MODELS / path).is_file(), "the build context is model_containers"
    assert "\nUSER 65534:65534\n" in dockerfile


@pytest.mark.parametrize("name", IN_IMAGE)
def test_a_model_of_other_packages_is_refused_by_the_process_engine(name):
    with pytest.raises(UserError, match=rf"calipert model build {name}.*CALIPERT_ENGINE=docker"):
        ProcessEngine().identity(MODELS / name)


def test_the_maker_of_embeddings_in_the_guide_works(tmp_path):
    guide = (MODELS.parent / "docs" / "models.md").read_text()
    (code,) = re.findall(r"```py\n(.*?)```", guide, flags=re.DOTALL)
    folder, published = tmp_path / "scaled", tmp_path / "published"
    for one in (folder, published):
        one.mkdir()
    (folder / "model.py").write_text(code)
    (published / "table.csv").write_text("gene,x,y\nB,1,2\nA,3,4\n")
    engine = ProcessEngine()
    events: list[Event] = []
    assert engine.describe(folder).input == "files"
    task = {"pretrained": str(published), "settings": {"times": 2}, "output": str(tmp_path / "output")}
    engine.run("embed", folder, task, on_event=events.append)
    assert events == [{"event": "progress", "done": 1, "total": 1, "unit": "table"}]
    table = contract.read_embedding(tmp_path / "output" / "embedding.parquet")
    assert table.to_dict("index") == {"A": {"d0": 6, "d1": 8}, "B": {"d0": 2, "d1": 4}}


def test_the_model_in_the_guide_works(panel, tmp_path):
    """Run by the engine, from a folder outside the project."""
    guide = (MODELS.parent / "docs" / "models.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    folder = tmp_path / "average"
    folder.mkdir()
    (folder / "model.py").write_text(code)
    engine = ProcessEngine()
    events: list[Event] = []
    assert engine.describe(folder).name == "average"
    tasks: dict[Stage, Any] = {
        "train": panel.train_task(tmp_path / "model"),
        "predict": panel.predict_task(tmp_path / "model", tmp_path / "output"),
    }
    for stage, task in tasks.items():
        spec = json.loads(json.dumps(vars(task), default=str))
        if stage == "predict":
            spec["conditions"] = [key._asdict() for key in task.conditions]
        engine.run(stage, folder, spec, on_event=events.append)
    assert events == [{"event": "progress", "done": 1, "total": 1, "unit": "fit"}]
    predictions = ad.read_h5ad(tmp_path / "output" / "predictions.h5ad")
    means = contract.dataset_means(contract.read_means(panel.folder / "train.h5ad"))
    assert predictions.n_obs == len(panel.held_out) - 1
    np.testing.assert_allclose(predictions.X, np.repeat(means.to_numpy(), predictions.n_obs, axis=0), rtol=1e-12)


def test_a_killed_model_goes_on(panel, tmp_path):
    """Its process is killed halfway; the files are those of an undisturbed training."""
    (tmp_path / "checkpoint").mkdir()
    settings = {"epochs": 300, "validate_every": 2, "hidden": 16, "latent": 4}

    def run(output: str, checkpoint: Path | None, until: int | None = None) -> str:
        task = panel.train_task(tmp_path / output, hyperparameters=settings, checkpoint=checkpoint)
        (tmp_path / "spec.json").write_text(json.dumps(vars(task), default=lambda path: str(path)))
        command = [sys.executable, str(MODELS / "fmlp" / "model.py"), "train", str(tmp_path / "spec.json")]
        with subprocess.Popen(command, env={"PYTHONPATH": str(MODELS)}, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if f'"done": {until},' in line:
                    process.kill()
        return said

    run("whole", None)
    run("broken", tmp_path / "checkpoint", until=100)
    assert not (tmp_path / "broken" / "weights.pt").exists()
    assert "goes on after epoch" in run("broken", tmp_path / "checkpoint")
    for name in ("weights.pt", "model.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
