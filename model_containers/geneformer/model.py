"""Geneformer (Theodoris et al. 2023): the vector by which a published transformer of cells knows each gene.

That is the gene's row among its token embeddings. README.md says how rows become symbols.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import contract

if TYPE_CHECKING:
    import numpy as np

DESCRIPTION = contract.Description(name="geneformer", combinations=False, embedding=False, gpu=False, input="files")
TENSOR = "bert.embeddings.word_embeddings.weight"
# How a pickle calls what makes a number of numpy's, before its version 2 and since.
NUMBER = (("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"))

Value = TypeVar("Value", int, str)


def embed(task: contract.EmbedTask) -> None:
    """Read the token embedding of each symbol whose Ensembl id is a token."""
    import pandas as pd

    contract.no_settings(task)
    token_of = read_dictionary(contract.only_file(task.pretrained, "token_dictionary*.pkl"), int)
    gene_of = read_dictionary(contract.only_file(task.pretrained, "gene_name_id_dict*.pkl"), str)
    table = read_tensor(task.pretrained / "model.safetensors")
    rows = {symbol: token_of[gene] for symbol, gene in sorted(gene_of.items()) if gene in token_of}
    if not rows:
        raise contract.ContractError(f"{task.pretrained}: no symbol has an Ensembl id that is a token")
    beyond = [symbol for symbol, row in rows.items() if not 0 <= row < len(table)]
    if beyond:
        raise contract.ContractError(f"{task.pretrained}: {beyond[0]} is token {rows[beyond[0]]} of {len(table)}")
    contract.write_embedding(task, pd.DataFrame(table[list(rows.values())], index=list(rows)))
    contract.progress(1, 1, "table")


def read_tensor(path: Path) -> np.ndarray:
    """Read the token embeddings of a checkpoint, tokens x width. Raises ContractError where it has none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            if TENSOR not in file.keys():  # noqa: SIM118 - it is no dictionary
                raise contract.ContractError(f"{path}: there is no {TENSOR}")
            table: np.ndarray = file.get_tensor(TENSOR)
    except (OSError, TypeError, SafetensorError) as error:
        raise contract.ContractError(f"{path}: no safetensors of plain numbers: {error}") from None
    if table.ndim != 2:
        raise contract.ContractError(f"{path}: {TENSOR} has shape {table.shape}; wanted tokens x width")
    return table


# ---- pickles that others wrote


def read_dictionary(path: Path, kind: type[Value]) -> dict[str, Value]:
    """Read a pickled dictionary from strings to strings or whole numbers.

    Raises ContractError where it holds anything else; nothing that the file names is called.
    """
    try:
        with path.open("rb") as file:
            found = PlainUnpickler(file).load()
    # A file that is no pickle, or is made to confuse, ends in almost any of these.
    except Exception as error:  # noqa: BLE001
        raise contract.ContractError(f"{path}: no pickle of a plain dictionary: {error}") from None
    if type(found) is not dict or any(type(key) is not str or type(found[key]) is not kind for key in found):
        raise contract.ContractError(f"{path}: not a dictionary from strings to {kind.__name__}")
    return found


class PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, strings and numbers.

    What a pickle would import is refused; numpy's whole numbers, which published files hold, are read without numpy.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Replace an import of the pickle's."""
        if (module, name) == ("numpy", "dtype"):
            return Kind
        if (module, name) in NUMBER:
            return Number
        raise pickle.UnpicklingError(f"it would import {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Refuse an object outside the pickle."""
        raise pickle.UnpicklingError(f"it refers to an object outside of it, {pid!r:.50}")


class Kind:
    """The dtype of a whole number, as a pickle makes it: `Kind("i8", False, True)`, then the byte order."""

    __slots__ = ("order", "signed", "size")

    def __init__(self, code: str, align: bool, copy: bool) -> None:
        if code not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
            raise pickle.UnpicklingError(f"it holds numpy's {code!r:.50}, no whole numbers")
        self.signed, self.size = code[0] == "i", int(code[1])
        self.order: Literal["little", "big"] = "little"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order; the rest of the state is not needed."""
        self.order = "big" if state[1] == ">" else "little"  # `|` of a single byte


class Number:
    """What numpy's `scalar` makes of a dtype and bytes: a number."""

    def __new__(cls, kind: Kind, content: bytes) -> Any:
        """Read the number."""
        if type(kind) is not Kind or type(content) is not bytes or len(content) != kind.size:
            raise pickle.UnpicklingError("it holds a number of numpy's that is none")
        return int.from_bytes(content, kind.order, signed=kind.signed)

    def __setstate__(self, state: Any) -> None:
        """Nothing is set: without this a pickle could set what it likes on the class."""


if __name__ == "__main__":
    contract.main(DESCRIPTION, embed=embed)
