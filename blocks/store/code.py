"""The identity of the code behind an artifact: the sources that a module can reach within the project."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib.util import resolve_name
from itertools import accumulate
from modulefinder import ModuleFinder
from pathlib import Path
from types import CodeType

from blocks.config.paths import PROJECT_ROOT

PACKAGES = ("core", "tasks", "flows", "blocks", "deployments", "model_containers")


TEMPLATE = ".html"
_AT_START = {
    path: path.read_bytes()
    for package in PACKAGES
    for path in (PROJECT_ROOT / package).rglob("*")
    if path.suffix in (".py", TEMPLATE)
}


def code_hash(module: str, root: Path = PROJECT_ROOT) -> str:
    """SHA-256 (hex) over the sources in a module's import closure within the project's own packages.

    A template beside a module, of the same name, counts with it (core/report/page.html with core/report/page.py). The
    files count as they were when this process started, which is what it runs: an edit in the meantime is for the
    next one.

    Any edit of such a file changes it, a comment or a docstring too: what an edit means cannot be known from
    its text, and a needless recomputation is cheaper than a stale result. Where the project lies, file times
    and everything outside the closure do not count.

    module: dotted name, such as `core.scoring.metrics`.
    root: folder that holds the packages.
    Raises ValueError if the project has no such module.
    """
    whole = sha256()
    for name, path in import_closure(module, root).items():
        for file in (path, path.with_suffix(TEMPLATE)):
            if file == path or file in _AT_START or file.is_file():
                whole.update(f"{name}{file.suffix}\0{sha256(_content(file)).hexdigest()}\n".encode())
    return whole.hexdigest()


def import_closure(module: str, root: Path = PROJECT_ROOT) -> dict[str, Path]:
    """Source file of every project module that importing `module` can bring in, by name, sorted.

    Found without running anything: import statements anywhere in a file count, also within functions and
    under TYPE_CHECKING, and so do the packages around a module. An import by a computed name is not seen.
    Raises ValueError if the project has no such module.
    """
    start = _source(module, root)
    if start is None:
        raise ValueError(f"no module {module} under {root} in the packages {', '.join(PACKAGES)}")
    found = {module: start}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = found[name]
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for wanted in (name, *_imported(_content(path), package)):
            # The packages around a module, then the module.
            for candidate in accumulate(wanted.split("."), "{}.{}".format):
                if candidate not in found and (source := _source(candidate, root)) is not None:
                    found[candidate] = source
                    waiting.append(candidate)
    return dict(sorted(found.items()))


def _content(path: Path) -> bytes:
    return _AT_START[path] if path in _AT_START else path.read_bytes()


def _source(module: str, root: Path) -> Path | None:
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return None
    base = root.joinpath(*parts)
    return next((p for p in (base / "__init__.py", base.with_name(f"{base.name}.py")) if p.is_file()), None)


@cache
def _imported(source: bytes, package: str) -> tuple[str, ...]:
    """Names that may be modules: `from a import b` names a and a.b, for b may be a submodule or an object."""
    names: list[str] = []
    for level, imported, objects in _imports(compile(source, package, "exec", dont_inherit=True)):
        base = resolve_name("." * level + imported, package)
        names += [base, *(f"{base}.{name}" for name in objects)]
    return tuple(names)


def _imports(code: CodeType) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(dots before it, module, what is imported from it) of each import in compiled code, functions included.

    From the bytecode: CPython 3.11 counts the depth of syntax trees for all threads together, and where another one,
    of whatever library, builds one at the same time, `ast.parse` can end in a SystemError ("AST constructor recursion
    depth mismatch").
    """
    for kind, found in ModuleFinder().scan_opcodes(code):
        if kind == "absolute_import":
            yield 0, found[1], found[0] or ()
        elif kind == "relative_import":
            yield found[0], found[2], found[1]
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _imports(part)
