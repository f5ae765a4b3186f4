"""The templates of the Kubernetes work pools as Prefect's server takes them."""

from __future__ import annotations

import json
from typing import Any

from blocks.config.paths import PROJECT_ROOT
from blocks.config.pools import CPU, GPU

FOLDER = PROJECT_ROOT / "deployments" / "kubernetes"


POOLS = (CPU, GPU)


def template(pool: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "pools" / f"{pool}.json").read_text(encoding="utf-8"))
    return found


def test_prefect_takes_the_templates() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=60), get_client(sync_client=True) as client:
        for pool in POOLS:
            client.create_work_pool(WorkPoolCreate(name=pool, type="kubernetes", base_job_template=template(pool)))
            assert client.read_work_pool(pool).base_job_template == template(pool)
