"""What runs before and after a model in its Kubernetes Job: its inputs from the bucket, its output into it.

    python -m blocks.engines.kubernetes.transfer fetch INTO NAME ...
        folders NAME of the bucket CALIPERT_STORE into INTO/NAME
    python -m blocks.engines.kubernetes.transfer publish FOLDER NAME
        a folder into the bucket under a name

The model's own container has neither the address nor the credentials of the bucket.
"""

from __future__ import annotations

import sys
from pathlib import Path

from blocks.config.settings import read_settings
from blocks.store.bucket import DamagedFolder, ObjectStore
from blocks.store.checksums import file_checksum
from core.errors import UserError

STORE = "CALIPERT_STORE"


def open_bucket() -> ObjectStore:
    """Return the bucket that CALIPERT_STORE names. Raises UserError where it names none."""
    url = read_settings().store
    if not url:
        remedy = "set it to s3://bucket/prefix: the Jobs of a cluster share their folders through it"
        raise UserError("environment", STORE, "no bucket", remedy)
    return ObjectStore(url)


def download(store: ObjectStore, name: str, folder: Path) -> bool:
    """Download a folder of the bucket into one that is new or empty; return False where there is none of this name.

    Each file is checked against its checksum. Raises DamagedFolder if the folder is not what its index says.
    """
    files = store.files(name)
    if files is None or not store.get(name, folder):
        return False
    for path, file in files.items():
        if file_checksum(folder / path) != file.sha256:
            raise DamagedFolder(f"{name}/{path} is not what its checksum says")
    return True


def main(arguments: list[str]) -> None:
    """Run one of the two commands; of an error the message alone goes to stderr."""
    try:
        match arguments:
            case ["fetch", into, *names] if names:
                store = open_bucket()
                for name in names:
                    if not download(store, name, Path(into) / name):
                        remedy = "compute it again with CALIPERT_STORE set, which puts it there"
                        raise UserError(name, "input of a Job", f"not in {store.url}", remedy)
            case ["publish", folder, name]:
                open_bucket().put(Path(folder), name)
            case _:
                sys.exit(__doc__)
    except (UserError, DamagedFolder) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
