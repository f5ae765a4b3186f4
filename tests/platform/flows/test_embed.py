"""The flow that makes a shared embedding: the same artifact that a benchmark makes, found again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blocks.config import child_environment
from core.embeddings.tables import read_embedding

GMT = "signalling\tR-1\tA\tB\tC\nrepair\tR-2\tB\tD\nsplicing\tR-3\tA\tD\tE\n"


FLOW = """
import json, sys
from flows.embed import embed
print('RESULT', embed(**json.loads(sys.argv[1])))
"""


class TestWithServers:
    @pytest.fixture
    def run(self, servers: child_environment.Services, tmp_path: Path) -> Callable[[Path], Path]:
        """Runs the flow in a process and a data folder of its own."""

        def call(gmt: Path) -> Path:
            parameters = {"embedding": "reactome", "sources": {"reactome": str(gmt)}}
            done = subprocess.run(
                [sys.executable, "-c", FLOW, json.dumps(parameters)],
                env=child_environment.build_child_environment(servers) | {"CALIPERT_DATA": str(tmp_path / "data")},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-4000:]
            return Path(done.stdout.rpartition("RESULT ")[2].strip())

        return call

    def test_it_is_made_once(self, run: Callable[[Path], Path], tmp_path: Path) -> None:
        gmt = tmp_path / "pathways.gmt"
        gmt.write_text(GMT, encoding="utf-8")
        folder = run(gmt)
        assert list(read_embedding(folder / "embedding.parquet").index) == ["A", "B", "C", "D", "E"]
        made = (folder / "manifest.json").stat().st_mtime_ns
        assert run(gmt) == folder
        assert (folder / "manifest.json").stat().st_mtime_ns == made
        gmt.write_text(GMT + "transport\tR-4\tC\tF\n", encoding="utf-8")
        assert run(gmt) != folder
