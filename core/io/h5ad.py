"""Reading h5ad files, the whole or only the names in them, and writing them some rows at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, sparse_dataset, write_elem
from scipy import sparse

from core.errors import UserError

# Half a megabyte a chunk: HDF5 keeps one such chunk at hand. More than 2^31 values must be countable.
STORAGE = {"compression": "lzf", "chunks": (1 << 17,), "indptr_dtype": "int64"}
BYTES_OF_AN_OBJECT = 64  # what Python takes for a text beside its letters
MARGIN = 1 << 16  # bytes that HDF5 writes beside the values

T = TypeVar("T")


def open_h5ad(path: Path) -> ad.AnnData:
    """Read the AnnData in `path` into memory.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    ad.AnnData

    Raises
    ------
    UserError
        If there is no such file or it is not an h5ad.
    """
    return _read(path, ad.read_h5ad)


def open_foreign_h5ad(path: Path, most_bytes: int) -> ad.AnnData:
    """Read an AnnData from a file that may be hostile.

    Parameters
    ----------
    path : Path
        The file.
    most_bytes : int
        The most that it may take.

    Returns
    -------
    ad.AnnData

    Raises
    ------
    UserError
        As `open_h5ad` does and, before anything is read, for a file that takes more than `most_bytes` of memory, or
        whose values would come from another file.
    """

    def read(path: Path) -> ad.AnnData:
        with h5py.File(path) as file:
            _require_self_contained(file, path)
            bytes_in_memory = _bytes_in_memory(file, most_bytes)
        if bytes_in_memory > most_bytes:
            found = f"{bytes_in_memory:,} bytes once it is read, of at most {most_bytes:,}"
            raise UserError(path, "size", found, "leave out everything but the predictions")
        return ad.read_h5ad(path)

    return _read(path, read)


def _require_self_contained(file: h5py.File, path: Path) -> None:
    """Refuse links, which this walk does not follow, and objects with two names, which anndata would read twice."""

    def look(name: str, thing: h5py.Group | h5py.Dataset) -> None:
        links: list[str] = []
        if isinstance(thing, h5py.Group):
            links = [f"{name}/{key}" for key in thing if not isinstance(thing.get(key, getlink=True), h5py.HardLink)]
        elif isinstance(thing, h5py.Dataset) and (thing.is_virtual or thing.external):
            links = [name]
        if links:
            raise UserError(
                path, links[0], "values from elsewhere", "write all values into the file, where they belong"
            )
        if h5py.h5o.get_info(thing.id).rc > 1:
            raise UserError(path, name or "/", "an object with several names", "write it under one")

    look("", file)
    file.visititems(look)


def _bytes_in_memory(file: h5py.File, most: int) -> int:
    """Count the bytes of all datasets, until they are more than `most`.

    As their shapes say, and of texts as long as they are: a compressed file may be a thousandth of it, an empty one
    less, and a thousand texts may be one in the file.
    """
    total = 0

    def count(_: str, thing: h5py.Group | h5py.Dataset) -> None:
        nonlocal total
        if not isinstance(thing, h5py.Dataset) or thing.shape is None:
            return
        total += thing.nbytes
        if not thing.dtype.hasobject:
            return
        total += BYTES_OF_AN_OBJECT * thing.size
        for index in np.ndindex(thing.shape) if total <= most else ():
            # One at a time: a few together may be larger than memory.
            total += len(thing[index])
            if total > most:
                return

    file.visititems(count)
    return total


def read_foreign_json(path: Path, most_bytes: int) -> Any:
    """Read the value in a JSON file that may be hostile.

    Parameters
    ----------
    path : Path
        The file.
    most_bytes : int
        The most that it may take.

    Returns
    -------
    Any

    Raises
    ------
    ValueError
        For a file that is larger than `most_bytes`, or no JSON; and OSError.
    """
    if path.stat().st_size > most_bytes:
        raise ValueError(f"{path.stat().st_size:,} bytes, of at most {most_bytes:,}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("brackets within brackets without end") from None


def read_names(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read only the tables of the rows (obs) and the columns (var) of an h5ad.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    tuple[pd.DataFrame, pd.DataFrame]

    Raises
    ------
    UserError
        As `open_h5ad` does.
    """
    return _read(path, _tables)


def _tables(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    with h5py.File(path) as file:
        if all(isinstance(file[name], h5py.Group) for name in ("obs", "var")):
            return _table(file["obs"]), _table(file["var"])
    # Older than anndata 0.7: the tables are not told apart from the rest of the file.
    backed = ad.read_h5ad(path, backed="r")
    try:
        return backed.obs.copy(), backed.var.copy()
    finally:
        backed.file.close()


def _table(group: h5py.Group) -> pd.DataFrame:
    table = read_elem(group)
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"{group.name} is no table")
    table.index = table.index.astype(str)
    return table


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        if not path.is_file():
            raise UserError(path, "file", "no such file", "check the path, or name the file as the data set's source")
        if path.stat().st_size == 0:
            raise UserError(path, "file", "not a readable h5ad: an empty file", "write or download it again")
        return read(path)
    except (UserError, MemoryError):
        raise
    except PermissionError as error:
        remedy = "let the user that calipert runs as read it (chmod), or copy it elsewhere"
        raise UserError(path, "file", "no permission to read it", remedy) from error
    # A damaged or foreign file makes h5py and anndata raise almost anything, classes of their own included.
    except Exception as error:
        raise UserError(
            path,
            "format",
            f"not a readable h5ad ({type(error).__name__}: {error})",
            "give an AnnData .h5ad file; if it is one, it is damaged: write or download it again",
        ) from error


def read_genes(path: Path) -> pd.Index:
    """Read only the names of the columns of an h5ad.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    pd.Index
    """
    return read_names(path)[1].index


def write_by_rows(path: Path, frame: ad.AnnData, parts: Iterable[Mapping[str, sparse.csr_matrix]]) -> None:
    """Write an h5ad whose matrices come some rows at a time.

    Parameters
    ----------
    path : Path
        The file.
    frame : ad.AnnData
        All but the matrices.
    parts : Iterable[Mapping[str, sparse.csr_matrix]]
        The next rows of each matrix by its place in the file, "X" or "layers/<name>", CSR; together as many rows as
        `frame` has, else ValueError. Without a part (a frame without rows) there is no matrix.
    """
    frame.write_h5ad(path)
    matrices = {}
    written: dict[str, int] = {}
    with h5py.File(path, "r+") as file:
        for part in parts:
            # HDF5 that meets a full disk cannot close its file, and may end the whole process later.
            needed = sum(rows.data.nbytes + rows.indices.nbytes + rows.indptr.nbytes for rows in part.values())
            require_space(path.parent, needed + MARGIN, f"the next rows of {path.name}")
            for place, rows in part.items():
                if place not in matrices:
                    write_elem(file, place, rows[:0], dataset_kwargs=STORAGE)
                    matrices[place] = sparse_dataset(file[place])
                matrices[place].append(rows)
                written[place] = written.get(place, 0) + rows.shape[0]
    wrong = {place: n for place, n in written.items() if n != frame.n_obs}
    if wrong or (frame.n_obs and not written):
        raise ValueError(f"{frame.n_obs} rows to write, but parts with {wrong or 'none'}")


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError where fewer than `needed` bytes are free in the file system of `folder`.

    Parameters
    ----------
    folder : Path
        Where the files lie, or go.
    needed : int
        Bytes.
    what : str
        Needs them, for the message. A check before long work: what else fills the disk meanwhile cannot be known.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            folder,
            "free disk space",
            f"{free / 1e9:,.3f} GB free; about {needed / 1e9:,.3f} GB are needed for {what}: "
            f"{(needed - free) / 1e9:,.3f} GB are missing",
            "free some space, or move the data folder to a larger disk (environment CALIPERT_DATA)",
        )
