"""The templates of the Kubernetes work pools as Prefect's server takes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from blocks.config.paths import PROJECT_ROOT
from blocks.config.pools import CPU, GPU

FOLDER = PROJECT_ROOT / "deployments" / "kubernetes"


POOLS = (CPU, GPU)


def template(pool: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "pools" / f"{pool}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.xdist_group("prefect_server")
def test_prefect_takes_the_templates(prefect_server: None, pool: str) -> None:
    name = f"kubernetes-{pool}"
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=name, type="kubernetes", base_job_template=template(pool)))
        assert client.read_work_pool(name).base_job_template == template(pool)
