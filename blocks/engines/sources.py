"""The files that make a model: those of its folder, and what models share."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from blocks.config.paths import MODEL_CONTAINERS

# What every model finds on its path; docs/models.md.
SHARED = tuple(MODEL_CONTAINERS / name for name in ("contract.py", "neural.py"))


def find_sources(model_folder: Path) -> dict[str, Path]:
    """Return a model's files by their path in its folder, and what models share, as `../contract.py`."""
    files = {path.relative_to(model_folder).as_posix(): path for path in model_folder.rglob("*") if path.is_file()}
    shared = {f"../{path.name}": path for path in SHARED}
    return {name: path for name, path in files.items() if not _is_litter(name)} | shared


def hash_sources(model_folder: Path) -> str:
    """Return the SHA-256 of a model's files and of what models share."""
    whole = sha256()
    for name, path in sorted(find_sources(model_folder).items()):
        whole.update(f"{name}\0{sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def _is_litter(name: str) -> bool:
    """Whether a file comes and goes without meaning anything: caches, hidden files."""
    return any(part == "__pycache__" or part.startswith(".") for part in name.split("/"))
