from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from blocks.config.paths import PROJECT_ROOT
from blocks.store.code import PACKAGES, _imports, code_hash, import_closure

SOURCES = {
    "core/__init__.py": "",
    "core/a.py": "import numpy\nfrom core import b\nfrom core.c import thing\n",
    "core/b.py": "def late():\n    import blocks.e as e\n    return e\n",
    "core/c.py": "thing = 1\nunseen = __import__('core.unused')\n",
    "core/unused.py": "",
    "core/deep/__init__.py": "from .inner import value\n",
    "core/deep/inner.py": "from ..c import thing as value\nfrom . import sibling\n",
    "core/deep/sibling.py": "import core.ring\n",
    "core/ring.py": "import core.deep\n",
    "blocks/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import core.b\n",
    "blocks/e.py": "",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for name, text in SOURCES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_closure_follows_submodules_late_imports_and_packages(project: Path) -> None:
    assert list(import_closure("core.a", project)) == [
        "blocks",
        "blocks.e",
        "core",
        "core.a",
        "core.b",
        "core.c",
    ]


def test_closure_resolves_relative_imports_and_rings(project: Path) -> None:
    expected = ["core", "core.c", "core.deep", "core.deep.inner", "core.deep.sibling", "core.ring"]
    assert list(import_closure("core.ring", project)) == expected
    assert list(import_closure("core.deep", project)) == expected


@pytest.mark.parametrize("edited", ["core/a.py", "core/b.py", "core/c.py", "blocks/e.py", "core/__init__.py"])
def test_hash_changes_with_any_file_of_the_closure(project: Path, edited: str) -> None:
    before = code_hash("core.a", project)
    with (project / edited).open("a", encoding="utf-8") as file:
        file.write("# a comment\n")
    assert code_hash("core.a", project) != before


def test_hash_ignores_other_files_places_and_times(project: Path, tmp_path: Path) -> None:
    before = code_hash("core.a", project)
    (project / "core" / "unused.py").write_text("changed = True\n", encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(project, elsewhere, copy_function=shutil.copyfile)
    assert code_hash("core.a", elsewhere) == before


def test_hash_sees_a_renamed_module(project: Path) -> None:
    before = code_hash("core.deep", project)
    (project / "core" / "ring.py").rename(project / "core" / "loop.py")
    (project / "core" / "deep" / "sibling.py").write_text("import core.loop\n", encoding="utf-8")
    assert code_hash("core.deep", project) != before


def test_a_new_submodule_joins_the_closure(project: Path) -> None:
    before = code_hash("core.a", project)
    (project / "core" / "c").mkdir()
    (project / "core" / "c" / "__init__.py").write_text("from core.c import thing\n", encoding="utf-8")
    (project / "core" / "c" / "thing.py").write_text("", encoding="utf-8")
    assert "core.c.thing" in import_closure("core.a", project)
    assert code_hash("core.a", project) != before


@pytest.mark.parametrize("name", ["core.missing", "numpy", "json", "tests.blocks"])
def test_unknown_module_is_refused(project: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"no module {name}"):
        code_hash(name, project)


def test_the_projects_own_modules_have_stable_hashes() -> None:
    closure = import_closure("blocks.store.code")
    assert {"blocks.store", "blocks.store.code", "blocks.config.paths"} <= set(closure)
    assert not any(name.startswith(("tasks", "flows")) for name in closure)
    assert code_hash("blocks.store.code") == code_hash("blocks.store.code")
    assert len(code_hash("blocks.store.code")) == 64


def test_a_template_beside_a_module_counts_with_it(project: Path) -> None:
    before = code_hash("core.a", project)
    template = project / "core" / "a.html"
    template.write_text("<p>one</p>", encoding="utf-8")
    first = code_hash("core.a", project)
    template.write_text("<p>two</p>", encoding="utf-8")
    assert len({before, first, code_hash("core.a", project)}) == 3


def test_it_builds_no_syntax_tree(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.11 ends with a SystemError where two threads build such trees at once, whoever the other is."""
    built: list[object] = []
    monkeypatch.setattr(ast, "parse", lambda *arguments, **_: built.append(arguments))
    (project / "core" / "fresh.py").write_text(f"import core.b  # {project}\n", encoding="utf-8")
    assert "core.b" in import_closure("core.fresh", project)
    assert built == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_imports_are_those_of_the_syntax_tree(package: str) -> None:
    """Of every file of the project."""
    files = sorted((PROJECT_ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wanted: set[tuple[int, str, tuple[str, ...]]] = set()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                wanted |= {(0, alias.name, ()) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                wanted.add((node.level, node.module or "", tuple(alias.name for alias in node.names)))
        assert set(_imports(compile(path.read_bytes(), str(path), "exec", dont_inherit=True))) == wanted, path
