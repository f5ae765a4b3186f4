"""What the command line refuses: one screen with where, field, found and remedy; status 2; nothing written."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from rich.console import Console

from core.catalog.registry import Kind
from flows.cli.listing import make_listing

Run = Callable[..., subprocess.CompletedProcess[str]]


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 24
    flat = " ".join(done.stderr.replace("│", " ").split())
    for word in ("where", "field", "found", "remedy", *words):
        assert word in flat, f"{word!r} is not in: {flat}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "dmeo"], ["did you mean demo"]),
        (["run", "demo", "--models", "ridge_reactom"], ["did you mean ridge_reactome", "knn_coexpression"]),
        (["run", "papalexi21_panel"], ["--source papalexi21_panel=FILE", "CALIPERT_SOURCE_PAPALEXI21_PANEL"]),
        (["run", "demo", "--source", "demo"], ["NAME=FILE"]),
        (["run", "demo", "--source", "norman19=x.h5ad"], ["takes no part"]),
        (["run", "papalexi21_panel", "--source", "papalexi21_panel=/no/such.h5ad"], ["no such file"]),
        (["run", "demo", "--folds", "many"], ["leave-one-out"]),
        (["run", "missing.yaml"], ["missing.yaml"]),
        (["score", "/no/such.h5ad", "--dataset", "demo"], ["no such file"]),
        (["list", "things"], ["datasets"]),
        (["run", "demo", "--origin", "mirror"], ["catalog entry demo", "origin raw"]),
        (["run", "norman19", "--origin", "mirror", "--folds", "2"], ["a mirror has its own"]),
        (["score", "/no/such.h5ad", "--dataset", "papalexi21", "--origin", "mirror"], ["catalog entry papalexi21"]),
        (["reproduce", "--datasets", "norman19,dmeo"], ["did you mean demo"]),
        (["reproduce", "--datasets", "norman19,demo", "--origin", "mirror"], ["catalog entry demo"]),
        (["reproduce", "--models", "ridge_reactom"], ["did you mean ridge_reactome"]),
        (["reproduce", "--source", "demo=x.h5ad"], ["takes no part"]),
    ],
)
def test_refused_before_any_server_starts(
    calipert: Run, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    refused(calipert(*arguments), *words)
    assert not (tmp_path / "data").exists()


def test_dataset_check_reads_an_entry_of_the_user_and_its_file(calipert: Run, tmp_path: Path) -> None:
    labels = np.repeat(["NT", *(f"GENE{i}_g1" for i in range(10)), "RARE_g1"], [30] * 11 + [2])
    cells = ad.AnnData(np.ones((len(labels), 5), dtype=np.float32))
    cells.obs["guide"] = labels
    cells.write_h5ad(tmp_path / "raw.h5ad")
    entry = tmp_path / "mine.yaml"
    entry.write_text(
        "name: mine\ntitle: mine\ntask: single\nsource: {kind: local, hint: mine}\n"
        "labels: {column: guide, control: [NT], cut_at: _}\n"
    )
    source = f"mine={tmp_path / 'raw.h5ad'}"
    done = calipert("dataset", "check", entry, "--source", source)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["all", "RARE", "RARE_g1", "2", "dropped:", "too", "few"] in lines
    assert ["all", "control", "NT", "30"] in lines
    entry.write_text(entry.read_text() + "min_cells_per_condition: 31\n")
    refused(calipert("dataset", "check", entry, "--source", source), "0 conditions with enough cells")
    refused(calipert("dataset", "check", entry), "--source mine=FILE")
    assert not (tmp_path / "data").exists()


def test_calibrate_refuses_what_is_no_h5ad_and_writes_nothing(calipert: Run, tmp_path: Path) -> None:
    text = tmp_path / "notes.h5ad"
    text.write_text("not an h5ad")
    refused(calipert("calibrate", text, "--out", tmp_path / "out"), "notes.h5ad", "not a readable h5ad")
    assert not (tmp_path / "out").exists()


OWN = {
    "embeddings/mine": "kind: gmt\ndimensions: 2\nsource: {kind: local, hint: mine}\n",
    "embeddings/made": "kind: container\ncontainer: maker\npretrained: tables\n",
    "embeddings/bucket": "kind: gmt\ndimensions: 2\nsource: {kind: s3, url: s3://bucket/mine.gmt}\n",
    "pretrained/tables": "files:\n  a: {kind: local, hint: mine}\n  b: {kind: https, url: https://example.org/b}\n",
}


def own_entries(folder: Path, entries: dict[str, str]) -> str:
    for name, text in entries.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"name: {path.stem}\ntitle: of mine\n{text}")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "name", "needs"),
    [
        ("dataset", "demo", ""),
        ("dataset", "norman19", "download"),
        ("dataset", "papalexi21_panel", "--source papalexi21_panel=FILE"),
        ("embedding", "coexpression", ""),
        ("embedding", "knowledge", "download"),
        ("embedding", "mine", "--source mine=FILE"),
        ("embedding", "made", "container maker, --source tables=FOLDER, download"),
        ("embedding", "bucket", "download"),
        ("embedding", "genept", "download, secret calipert-openai-key"),
        ("model", "linear", ""),
        ("model", "fmlp_mine", "container fmlp, --source mine=FILE"),
        ("model", "scgpt", "container scgpt, download"),
        ("group", "demo", "container fmlp, container ridge"),
        ("pretrained", "ncbi_genes", "download"),
    ],
)
def test_the_list_says_what_an_entry_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: Kind, name: str, needs: str
) -> None:
    monkeypatch.setenv("CALIPERT_CATALOG", own_entries(tmp_path, OWN))
    console = Console(width=400)
    with console.capture() as shown:
        console.print(make_listing(kind))
    (line,) = (line for line in shown.get().splitlines() if line.split()[:1] == [name])
    found = [part.strip() for part in line.split("  ") if part.strip()][2:]
    assert found == ([needs] if needs else [])


def test_a_group_that_names_no_model_is_named_with_its_file(
    calipert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALIPERT_CATALOG", own_entries(tmp_path, {"groups/mine": "models: [linear, demo]\n"}))
    refused(calipert("list", "groups"), "groups/mine.yaml", "'demo', which is not known")


def test_help_says_what_each_command_does(calipert: Run) -> None:
    done = calipert("--help")
    assert done.returncode == 0
    for command in ("run", "reproduce", "calibrate", "score", "list", "env"):
        assert command in done.stdout
