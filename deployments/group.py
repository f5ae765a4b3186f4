"""What the servers of a group need before workers start: `python -m deployments.group`, which compose.yaml runs.

Buckets in the S3 store, the workers' account in MLflow, work pools, all deployments, and the automation that marks
runs without a sign of life. All of it may be repeated: what exists stays, and the account gets the password that
the environment names. Addresses and passwords come from the environment alone.
"""

from __future__ import annotations

import os
import sys

from blocks.config.pools import CPU, GPU
from blocks.services.stack import SILENT_RUNS
from core.errors import UserError
from deployments.table import build_table

BUCKETS = ("calipert", "mlflow")


def prepare() -> None:
    """Prepare the servers. Raises UserError for a catalog entry that does not fit, or a variable that is not set."""
    rows = build_table()
    make_buckets()
    make_account()
    watch_runs()
    from deployments.register import create_work_pool, register

    for pool in (CPU, GPU):
        create_work_pool(pool)
    register(rows)


def make_buckets() -> None:
    """Make the buckets of the artifacts and of MLflow's files in the S3 store that AWS_ENDPOINT_URL names."""
    from s3fs import S3FileSystem

    store = S3FileSystem()
    for bucket in BUCKETS:
        if not store.exists(bucket):
            store.mkdir(bucket)


def make_account() -> None:
    """Make the MLflow account MLFLOW_TRACKING_USERNAME, without rights to administer, or set its password again."""
    from mlflow.exceptions import MlflowException
    from mlflow.server.auth.client import AuthServiceClient

    name, password = _variable("MLFLOW_TRACKING_USERNAME"), _variable("MLFLOW_TRACKING_PASSWORD")
    admin, admin_password = _variable("MLFLOW_AUTH_ADMIN_USERNAME"), _variable("MLFLOW_AUTH_ADMIN_PASSWORD")
    # MLflow's client takes its own name and password from these two only.
    os.environ |= {"MLFLOW_TRACKING_USERNAME": admin, "MLFLOW_TRACKING_PASSWORD": admin_password}
    client = AuthServiceClient(_variable("MLFLOW_TRACKING_URI"))
    try:
        client.create_user(name, password)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_user_password(name, password)
    finally:
        os.environ |= {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}


def watch_runs() -> None:
    """Make the automation that ends runs of killed processes, unless it exists."""
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import AutomationCore

    automation = AutomationCore.model_validate(SILENT_RUNS)
    with get_client(sync_client=True) as client:
        if not client.read_automations_by_name(automation.name):
            client.create_automation(automation)


def main() -> None:
    """Prepare the servers; an error that the user can fix ends it with status 1."""
    try:
        prepare()
    except UserError as error:
        sys.exit(str(error))


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise UserError("the environment", name, "not set", "set it as deployments/compose.yaml does")
    return value


if __name__ == "__main__":
    main()
