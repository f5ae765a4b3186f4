"""Where the project keeps its data."""

from __future__ import annotations

from pathlib import Path

from blocks.config.settings import read_places

PROJECT_ROOT = Path(__file__).resolve().parents[2]
MODEL_CONTAINERS = PROJECT_ROOT / "model_containers"


def data_folder() -> Path:
    """Return the data folder, absolute: CALIPERT_DATA, else `data` in the project's root.

    None of the functions here creates a folder; the caller that writes does.
    """
    return read_places().data


def store_folder() -> Path:
    """Root of the artifact store."""
    return data_folder() / "store"


def downloads_folder() -> Path:
    """Raw files as they were downloaded."""
    return data_folder() / "downloads"


def vectors_folder() -> Path:
    """Vectors of texts that a service was paid for (blocks.services.vectors)."""
    return data_folder() / "vectors"


def prefect_folder() -> Path:
    """PREFECT_HOME of the private server: its database and results, and no settings of the user's."""
    return data_folder() / "prefect"


def mlflow_folder() -> Path:
    """MLflow's database (mlflow.db) and artifacts."""
    return data_folder() / "mlflow"


def temporary_folder() -> Path:
    """Temporary files of the workers that run here, a folder for each."""
    return data_folder() / "tmp"


def services_file() -> Path:
    """Record of the local services that were started."""
    return data_folder() / "services.json"


def logs_folder() -> Path:
    """Folder of the logs of the local services."""
    return data_folder() / "logs"


def reports_folder(dataset: str) -> Path:
    """Folder with a copy of the latest report of one data set."""
    return data_folder() / "reports" / dataset


def checkpoints_folder() -> Path:
    """Parent of the folders from which killed stages continue (blocks.engines.checkpoints)."""
    return data_folder() / "checkpoints"


def scratch_folder() -> Path:
    """Parent of the folders that end with the process that made them (blocks.local.scratch)."""
    return data_folder() / "scratch"
