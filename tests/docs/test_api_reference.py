"""The pages of the API reference name all of core."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_each_module_and_package_of_core_is_on_a_page() -> None:
    text = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    names = set(re.findall(r"^::: core\.(\w+)", text, re.MULTILINE))
    parts = [*(ROOT / "core").glob("*.py"), *(path.parent for path in (ROOT / "core").glob("*/__init__.py"))]
    assert names == {path.stem for path in parts} - {"__init__"}
