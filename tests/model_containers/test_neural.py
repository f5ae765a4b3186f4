"""What the neural models share: rows, Adam, and trainings that go on where they were killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from model_containers import contract, neural

CPU = torch.device("cpu")
MODELS = Path(contract.__file__).parent


@pytest.fixture(params=["dense", "compressed"])
def form(request, monkeypatch) -> str:
    """How the cells are held."""
    if request.param == "compressed":
        monkeypatch.setattr(neural, "DENSE_BYTES", 0)
    return request.param


def test_rows_are_those_of_the_matrix(form):
    X = sparse.random(40, 7, 0.5, format="csr", dtype=np.float32, rng=np.random.default_rng(2))
    X = sparse.csr_matrix(X.multiply(np.isin(np.arange(40), [3, 17], invert=True)[:, None]))  # cells without an entry
    batch = np.array([17, 5, 3, 5, 39, 0])
    rows = neural.hold_rows(X, CPU)
    np.testing.assert_array_equal(rows(batch).numpy(), X.toarray()[batch])
    # What a GPU would do.
    made = neural.dense_rows(X.indptr, torch.from_numpy(X.indices), torch.from_numpy(X.data), 7, batch)
    np.testing.assert_array_equal(made.numpy(), X.toarray()[batch])


@pytest.mark.parametrize(("weight_decay", "largest_norm"), [(0.0, None), (0.1, None), (0.0, 0.5)])
def test_a_step_is_adams(weight_decay, largest_norm):
    mine, theirs, unused = (torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(3))
    adam = neural.Adam([mine, unused], weight_decay)
    reference = torch.optim.Adam([theirs], lr=0.1, weight_decay=weight_decay)
    for rate in (0.1, 0.1, 0.02):
        adam.step((mine**3).sum(), rate, largest_norm)
        reference.param_groups[0]["lr"] = rate
        reference.zero_grad()
        (theirs**3).sum().backward()
        if largest_norm is not None:
            torch.nn.utils.clip_grad_norm_([theirs], largest_norm)
        reference.step()
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(unused.detach(), torch.tensor([1.0, -2.0, 3.0]))


def test_the_best_weights_are_those_of_the_least_loss():
    net = torch.nn.Linear(1, 1)
    best = neural.Best(net)
    assert best.weights["bias"] == net.bias
    for value, loss in ((1.0, 0.5), (2.0, 0.25), (3.0, 0.25), (4.0, float("nan"))):
        net.bias.data.fill_(value)
        best.offer(loss)
    assert (best.weights["bias"].item(), best.least, best.stale) == (2.0, 0.25, 2)


# ---- trainings that are cut off


def train(task: contract.TrainTask, count: int = 8, cut: int | None = None) -> tuple[dict[str, Any], list[int]]:
    """A network with dropout learns noise; its state at the end, and the epochs that were computed. cut: the epoch in
    whose midst the training dies."""
    contract._METRICS.clear()  # each training is a process
    torch.manual_seed(task.seed)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Dropout(0.5), torch.nn.Linear(5, 1))
    adam, best = neural.Adam(list(net.parameters())), neural.Best(net)
    seen = []
    for epoch in neural.epochs(task, count, {"net": net, "adam": adam, "best": best}, lambda: best.stale >= 5):
        seen.append(epoch)
        draws = neural.generator(task.seed, epoch)
        loss = net(torch.from_numpy(draws.normal(size=(6, 3)).astype(np.float32))).square().mean()
        if epoch == cut:
            raise KeyboardInterrupt
        adam.step(loss, 0.1)
        contract.metric("loss", epoch, float(loss.detach()))
        best.offer(float(loss.detach()))
    return {"weights": neural.copy_of(net), "best": best.state_dict(), "adam": adam.state_dict()}, seen


def task_in(folder: Path, **changes: Any) -> contract.TrainTask:
    given: dict[str, Any] = {"cells": folder, "embedding": None, "hyperparameters": {}}
    given |= {"seed": 3, "threads": 1, "output": folder}
    return contract.TrainTask(**(given | changes))


@pytest.fixture
def every_epoch(monkeypatch) -> None:
    """A checkpoint after every epoch, however long it takes."""
    monkeypatch.setattr(neural, "SAVING_SHARE", float("inf"))


@pytest.mark.usefixtures("every_epoch")
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_training_that_was_cut_off_goes_on_to_the_same_bits(tmp_path, capsys, cut):
    whole, all_epochs = train(task_in(tmp_path))
    expected = metrics(capsys)
    assert len(all_epochs) >= cut
    with pytest.raises(KeyboardInterrupt):
        train(task_in(tmp_path, checkpoint=tmp_path), cut=cut)
    capsys.readouterr()
    found, epochs = train(task_in(tmp_path, checkpoint=tmp_path))
    assert epochs == all_epochs[cut - 1 :]
    assert str(found) == str(whole)
    for one, other in zip(leaves(found), leaves(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert metrics(capsys) == expected, "those of the first part are told again"


def leaves(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [leaf for part in parts for leaf in leaves(part)]


def metrics(capsys) -> list[tuple[str, int, float]]:
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [(one["name"], one["step"], one["value"]) for one in events if one["event"] == "metric"]


@pytest.mark.usefixtures("every_epoch")
def test_enough_is_asked_before_an_epoch_of_a_training_that_goes_on(tmp_path, capsys):
    _, all_epochs = train(task_in(tmp_path, checkpoint=tmp_path), count=50)
    assert len(all_epochs) < 50, "it stops early"
    assert train(task_in(tmp_path, checkpoint=tmp_path), count=50)[1] == []
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["event"] == "progress"


@pytest.mark.usefixtures("every_epoch")
@pytest.mark.parametrize("other", [{"seed": 4}, {"hyperparameters": {"width": 1}}])
def test_the_checkpoint_of_another_training_is_not_taken(tmp_path, capsys, other):
    train(task_in(tmp_path, checkpoint=tmp_path), count=2)
    assert train(task_in(tmp_path, checkpoint=tmp_path, **other), count=2)[1] == [1, 2]
    assert "starts from the beginning" in capsys.readouterr().out


@pytest.mark.usefixtures("every_epoch")
@pytest.mark.parametrize("damage", [b"", b"no checkpoint", None])
def test_a_damaged_checkpoint_is_not_taken(tmp_path, capsys, damage):
    train(task_in(tmp_path, checkpoint=tmp_path), count=2)
    path = tmp_path / neural.CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    assert train(task_in(tmp_path, checkpoint=tmp_path), count=2)[1] == [1, 2]
    assert "cannot be read" in capsys.readouterr().out
