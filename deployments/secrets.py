"""Make the passwords of compose.yaml: `python3 -m deployments.secrets deployments/.env`, in the project's root.

Uses the standard library alone, so that a server needs no environment of the project's.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import sys
from pathlib import Path

from core.errors import UserError

EXAMPLE = Path(__file__).with_name(".env.example")
# Letters and digits: they mean themselves in an address, in YAML, in SQL and to a shell.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
LENGTH = 32


def fill_example(example: str) -> str:
    """Return the text of an .env file: every empty variable gets a random value of its own, of 190 bits."""
    return re.sub(r"^(\w+)=$", lambda found: f"{found[1]}={_random()}", example, flags=re.MULTILINE)


def write(path: Path) -> None:
    """Write .env.example, filled, into a new file that its owner alone may read.

    Raises UserError where the file exists: databases keep the passwords with which they were made.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        remedy = "keep it; to change one password, follow docs/deploying.md"
        raise UserError(path, "the file with the passwords", "it exists", remedy) from None
    except FileNotFoundError:
        raise UserError(path, "the file's folder", "it does not exist", "name a file in an existing folder") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(fill_example(EXAMPLE.read_text(encoding="utf-8")))


def main() -> None:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(prog="python3 -m deployments.secrets", description=__doc__)
    parser.add_argument("file", type=Path, help="the new file, deployments/.env")
    path = parser.parse_args().file
    try:
        write(path)
    except UserError as error:
        sys.exit(str(error))
    sys.stdout.write(f"wrote {path}\n")


def _random() -> str:
    return "".join(secrets.choice(LETTERS) for _ in range(LENGTH))


if __name__ == "__main__":
    main()
