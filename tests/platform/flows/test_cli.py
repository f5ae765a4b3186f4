"""The command line with servers: refusals that need the file's content, and predictions made elsewhere."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 24
    flat = " ".join(done.stderr.replace("│", " ").split())
    for word in ("where", "field", "found", "remedy", *words):
        assert word in flat, f"{word!r} is not in: {flat}"


class TestWithServers:
    """Refusals that need the file's content; and predictions made elsewhere."""

    @pytest.fixture
    def data(self, servers: object) -> Path:
        from blocks.config.paths import data_folder

        return data_folder()

    def test_a_raw_file_without_controls_is_refused_and_leaves_no_artifact(
        self, calipert: Run, data: Path, screen: Path, entry: Path, tmp_path: Path
    ) -> None:
        raw = ad.read_h5ad(screen)
        raw[(raw.obs["perturbation"] != "control").to_numpy()].copy().write_h5ad(tmp_path / "raw.h5ad")
        before = set((data / "store").rglob("*"))
        done = calipert(
            "run", entry, "--models", "ridge_coexpression", "--source", f"tiny={tmp_path / 'raw.h5ad'}", data=data
        )
        refused(done, "raw.h5ad", "no control cells", "labels.control")
        assert {p for p in (data / "store").rglob("*") if ".lock" not in str(p) and p.is_file()} <= before | {
            p for p in (data / "store").rglob("*") if p.stat().st_size == 0
        }

    def test_predictions_made_elsewhere_are_scored_or_refused(
        self, calipert: Run, data: Path, screen: Path, entry: Path, tmp_path: Path
    ) -> None:
        source = f"tiny={screen}"
        # A seed of its own gives a reference of its own: the store holds those of other tests too.
        entry.write_text(entry.read_text() + "seed: 11\n")
        before = set((data / "store" / "reference").glob("*/reference.h5ad"))
        done = calipert("run", entry, "--models", "ridge_coexpression", "--source", source, data=data)
        assert done.returncode == 0, done.stderr
        (reference,) = set((data / "store" / "reference").glob("*/reference.h5ad")) - before
        truth = ad.read_h5ad(reference)
        perfect = ad.AnnData(X=truth.layers["truth"], obs=truth.obs[["covariate", "condition"]], var=truth.var[[]])
        perfect.write_h5ad(tmp_path / "perfect.h5ad")
        done = calipert(
            "score", tmp_path / "perfect.h5ad", "--dataset", entry, "--name", "oracle", "--source", source, data=data
        )
        assert done.returncode == 0, done.stderr
        assert "oracle" in done.stdout
        broken = perfect.copy()
        broken.X = np.expm1(np.asarray(broken.X)).round()
        broken.write_h5ad(tmp_path / "counts.h5ad")
        done = calipert("score", tmp_path / "counts.h5ad", "--dataset", entry, "--source", source, data=data)
        refused(done, "counts.h5ad", "log1p")
