"""The embedding by a service as a flow on a server: retries, the key from its Secret block, and nobody sees the key."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest

from blocks.config import child_environment
from blocks.config.child_environment import Services
from tests.helpers import text_service_stand_in as stand_in

TEXTS = {f"G{number}": f"What gene {number} does." for number in range(5)}
KEY = "sk-planted9876543210fedcba"
FLOW = """
import json, sys
from tasks import embed_texts
embed_texts.TEXTS_AT_ONCE = 2
from flows.embed import embed
print('RESULT', embed(**json.loads(sys.argv[1])))
"""
BLOCK = """
import sys
from prefect.blocks.system import Secret
if sys.argv[2]:
    Secret(value=sys.argv[2]).save(sys.argv[1], overwrite=True)
else:
    Secret.delete(sys.argv[1])
"""


@pytest.fixture
def service() -> Iterator[Any]:
    with stand_in.serving() as running:
        yield running


@pytest.fixture
def put(servers: Services) -> Iterator[Callable[[str], None]]:
    """Puts a value into the Secret block, which is gone at the end."""

    def change(value: str) -> None:
        command = [sys.executable, "-c", BLOCK, stand_in.SECRET, value]
        subprocess.run(command, env=child_environment.build_child_environment(servers), check=True, timeout=120)

    yield change
    change("")


@pytest.fixture
def run(servers: Services, service: Any, tmp_path: Path) -> Callable[[], subprocess.CompletedProcess[str]]:
    """Runs the flow in a process and a data folder of its own, and says all that there is to say."""
    stand_in.write_entry(tmp_path / "catalog", service.url)
    genes = stand_in.write_genes(tmp_path / "genes", TEXTS)
    mine = {"CALIPERT_DATA": str(tmp_path / "data"), "CALIPERT_CATALOG": str(tmp_path / "catalog")}
    parameters = {"embedding": "mine", "sources": {"ncbi_genes": str(genes)}}

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", FLOW, json.dumps(parameters)],
            env=child_environment.build_child_environment(servers) | mine | {"PREFECT_LOGGING_LEVEL": "DEBUG"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return call


def test_what_passes_is_tried_again_and_what_does_not_fails_once(
    servers: Services,
    service: Any,
    run: Callable[[], subprocess.CompletedProcess[str]],
    put: Callable[[str], None],
    tmp_path: Path,
) -> None:
    without = run()
    assert without.returncode == 1
    assert "make the Secret block calipert-text-key" in without.stderr
    assert not service.asked

    put(KEY)
    service.next = [
        service.answer,
        lambda _: (429, {"Retry-After": "1"}, b""),
        lambda _: (401, {}, {"error": {"message": f"not {KEY}"}}),
    ]
    refused = run()
    assert refused.returncode == 1
    assert "HTTP 401" in refused.stderr
    assert "put a valid key into the Secret block calipert-text-key" in refused.stderr
    assert "trying again" in refused.stderr
    texts = sorted(TEXTS.values())
    # The second two texts: put off, then refused, and that once.
    assert [request["input"] for request in service.asked] == [texts[:2], texts[2:4], texts[2:4]]

    done = run()
    assert done.returncode == 0, done.stderr[-4000:]
    assert [request["input"] for request in service.asked[3:]] == [texts[2:4], texts[4:]]
    assert "3 of 5 texts are asked of" in done.stderr
    table = pd.read_parquet(Path(done.stdout.rpartition("RESULT ")[2].strip()) / "embedding.parquet")
    assert list(table.loc["G3"]) == stand_in.vector(TEXTS["G3"])

    said = "".join(one.stdout + one.stderr for one in (without, refused, done))
    for kind in ("logs", "flow_runs", "task_runs", "artifacts"):
        rows = httpx.post(f"{servers.prefect_api}/{kind}/filter", json={"limit": 200}, timeout=60).raise_for_status()
        said += rows.text
    assert "ask for mine" in said
    assert KEY not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
