"""`deployments.local` with few deployments: `python -m tests.helpers.few_deployments up benchmark/demo train-fold/any`.

Registering all of the table takes longer than what most tests do with one row of it.
"""

from __future__ import annotations

import sys
from unittest import mock

from deployments import local
from deployments.table import build_table


def main(command: str, *names: str) -> None:
    """Run a command of `deployments.local` as if the table had the rows of these names alone."""
    rows = [row for row in build_table() if row.full_name in names]
    if missing := set(names) - {row.full_name for row in rows}:
        raise SystemExit(f"not in the table of deployments: {sorted(missing)}")
    with mock.patch.object(local, "build_table", return_value=rows):
        local.COMMANDS[command]()


if __name__ == "__main__":
    main(*sys.argv[1:])
