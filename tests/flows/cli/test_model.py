"""`calipert model`: the contract's tests of a folder, and images."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blocks.engines.base import Engine, ModelFailed, StageRun, Usage
from blocks.engines.lines import read_event
from core.errors import UserError
from flows.cli import model as model_cli
from flows.cli.main import app
from flows.cli.model_check import check_model
from model_containers import contract

MODELS = Path(__file__).resolve().parents[3] / "model_containers"
GUIDE = MODELS.parent / "docs" / "models.md"
RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("CALIPERT_ENGINE", raising=False)


@pytest.fixture
def average(tmp_path: Path) -> Callable[..., Path]:
    """The folder of the model in the guide, with one text of its code replaced by another."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    # What the guide's model leaves out: it has no hyperparameters.
    code = code.replace(
        "    means = contract.dataset_means",
        "    contract.hyperparameters(task, Settings)\n    means = contract.dataset_means",
        1,
    )
    code = code.replace(
        "import contract\n",
        "from dataclasses import dataclass\n\nimport contract\n\n\n@dataclass\nclass Settings:\n    pass\n",
    )

    def make(old: str = "", new: str = "") -> Path:
        assert old in code
        folder = tmp_path / "average"
        folder.mkdir()
        (folder / "model.py").write_text(code.replace(old, new))
        (folder / "requirements.txt").write_text("pandas\n")
        for name in ("Dockerfile", "README.md"):
            (folder / name).write_text("")
        return folder

    return make


class InThisProcess(Engine):
    """An engine that imports what a process would import once only."""

    def run_stage(self, run: StageRun) -> Usage:
        stage, model_folder, spec, on_event = run.stage, run.model_folder, run.spec, run.on_event
        file, printed, said = model_folder.parent / "spec.json", io.StringIO(), io.StringIO()
        file.write_text(json.dumps(spec))
        try:
            with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(said):
                patch.setitem(sys.modules, "contract", contract)
                patch.setattr(sys, "argv", ["model.py", stage, str(file)])
                runpy.run_path(str(model_folder / "model.py"), run_name="__main__")
        except (SystemExit, Exception) as error:
            code = error.code if isinstance(error, SystemExit) and not isinstance(error.code, str) else 1
            raise ModelFailed(model_folder.name, stage, f"ended: {error}", code, (said.getvalue(),)) from error
        for line in printed.getvalue().splitlines():
            on_event(read_event(line))
        return Usage(0.0, None, None, "cpu")

    def identity(self, model_folder: Path) -> str:
        return "here"


def check(*arguments: str) -> tuple[int, list[str], str]:
    """Exit status, what was found wrong, and all that was printed."""
    done = RUNNER.invoke(app, ["model", "check", *arguments])
    if isinstance(done.exception, UserError):
        raise done.exception
    fails = [line.removeprefix("fails ") for line in done.output.splitlines() if line.startswith("fails ")]
    return done.exit_code, fails, done.output


def test_a_model_that_keeps_the_contract(average):
    status, fails, output = check(str(average()))
    assert (status, fails) == (0, []), output
    assert output.count("ok ") == 9


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('name="average"', 'name="other"', "by its folder's name"),
        ("if key.covariate in means.index", "", "it trains and predicts"),
        ("contract.progress(1, 1", "contract.progress(1, 2", "its progress reaches its end"),
        ('    contract.progress(1, 1, "fit")', "    print()", "its progress reaches its end"),
        ("combinations=True", "combinations=False", "it leaves out what it cannot know"),
        (
            "if key.covariate in means.index",
            "if '+' not in key.condition and key.covariate in means.index",
            "and nothing else",
        ),
        ("contract.hyperparameters(task, Settings)", "", "it refuses a hyperparameter"),
        (".to_numpy()\n", ".to_numpy() + 100\n", "it answers every condition"),
        (".to_numpy()\n", ".to_numpy() + (keys[0] > keys[-1]) / 100\n", "the same input gives the same bytes"),
        ("means.to_parquet(", "(task.cells.parent / 'mark').touch(); means.to_parquet(", "it leaves its input alone"),
    ],
)
def test_what_is_wrong_is_found(average, old, new, fault):
    found = list(check_model(average(old, new), InThisProcess(), "table", {}))
    wrong = [finding for finding in found if finding.fault is not None]
    assert len(wrong) == 1, wrong
    assert fault in wrong[0].asked


def test_a_folder_that_is_not_whole(average):
    folder = average()
    (folder / "README.md").unlink()
    status, fails, output = check(str(folder))
    assert (status, fails) == (1, ["its folder is whole"])
    assert "there is no README.md" in output


@pytest.mark.parametrize("requirement", ["pandas", "no-such-package"])
def test_a_maker_of_embeddings_is_no_model(tmp_path, requirement):
    folder = shutil.copytree(MODELS / "geneformer", tmp_path / "geneformer")
    (folder / "requirements.txt").write_text(f"{requirement}\n")
    with pytest.raises(UserError, match="it makes embeddings, and is no model"):
        check(str(folder))


@pytest.mark.parametrize("imports", ["import contract\n", "import contract\nimport no_such_package\n"])
def test_packages_that_are_missing_are_refused_with_the_remedy(average, imports):
    folder = average("import contract\n", imports)
    (folder / "requirements.txt").write_text("no-such-package\n")
    with pytest.raises(UserError, match=r"(?s)lacks a package: no-such-package.*install here"):
        check(str(folder))


def test_the_list_has_models_and_embeddings():
    users = model_cli._list_users()
    assert users["scgpt"] == ["scgpt", "embedding scgpt"]
    assert users["geneformer"] == ["embedding geneformer"]
    assert "knn_geneformer" in users["knn"]


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"(?s)no folder with a model\.py.*fmlp,.* ridge"):
        check(str(tmp_path / "nothing"))


@pytest.mark.parametrize("text", ["epochs=4", "[4]"])
def test_hyperparameters_that_are_no_object(text):
    with pytest.raises(UserError, match="--hyperparameters"):
        check("ridge", "--hyperparameters", text)


def test_hyperparameters_reach_the_model():
    status, fails, output = check("ridge", "--hyperparameters", '{"alphas": [-1.0]}')
    assert (status, fails) == (1, ["it trains and predicts"])
    assert "wanted one or more numbers above 0" in output
