from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from blocks.config.catalog import open_catalog
from model_containers import contract
from tasks import embed, sources

TENSOR = "bert.embeddings.word_embeddings.weight"
TOKENS, SYMBOLS = "token_dictionary_gc104M.pkl", "gene_name_id_dict_gc104M.pkl"
SPECIAL = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}
TOKEN_OF = {"ENSG1": 4, "ENSG2": 5, "ENSG3": 6, "ENSG9": 7}
# Two names of one gene; one whose gene is no token. ENSG9 has no name.
GENE_OF = {"BBB": "ENSG2", "AAA": "ENSG1", "AAA-OLD": "ENSG1", "CCC": "ENSG3", "DDD": "ENSG4"}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """All files that the embedding is made of."""
    folder = tmp_path / "published"
    folder.mkdir()
    write(folder)
    return folder


def write(folder: Path, token_of: Any = SPECIAL | TOKEN_OF, gene_of: Any = GENE_OF, **tensors: np.ndarray) -> None:
    (folder / TOKENS).write_bytes(pickle.dumps(token_of))
    (folder / SYMBOLS).write_bytes(pickle.dumps(gene_of))
    table = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    save_file(tensors or {TENSOR: table, "cls.predictions.bias": table[0]}, folder / "model.safetensors")


@pytest.fixture
def made(load, published: Path, tmp_path: Path) -> Callable[..., Path]:
    """The file that it writes."""

    def make(name: str = "output", **settings: object) -> Path:
        output = tmp_path / name
        output.mkdir()
        load("geneformer").embed(contract.EmbedTask(published, settings, 1, output))
        return output / "embedding.parquet"

    return make


def test_symbols_have_the_rows_of_their_ensembl_ids(made):
    table = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    found = pd.read_parquet(made())
    assert found.index.tolist() == ["AAA", "AAA-OLD", "BBB", "CCC"]
    np.testing.assert_array_equal(found, table[[4, 4, 5, 6]].astype(np.float64))


def test_bytes_do_not_depend_on_the_order_of_the_dictionaries(made, published):
    before = made("one").read_bytes()
    write(published, dict(reversed((SPECIAL | TOKEN_OF).items())), dict(reversed(GENE_OF.items())))
    assert made("two").read_bytes() == before


@pytest.mark.parametrize("kind", [np.int64, np.int16, np.uint8, np.dtype(">i4").type, int])
def test_tokens_may_be_numbers_of_numpys(made, published, kind):
    before = made("one").read_bytes()
    write(published, {gene: kind(token) for gene, token in TOKEN_OF.items()})
    assert made("two").read_bytes() == before


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize(("order", "content"), [(b"<", b"\xfe\xff"), (b">", b"\xff\xfe")])
def test_numbers_of_numpys_are_read_without_it(load, tmp_path, module, order, content):
    """As all versions of numpy write them, in both orders of bytes."""
    dtype = (
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00i2\x89\x88tR(K\x03X\x01\x00\x00\x00" + order + b"NNNJ\xff\xff\xff\xffK\x00tb"
    )
    (tmp_path / "numbers.pkl").write_bytes(
        b"\x80\x03}X\x01\x00\x00\x00ac" + module + b"\nscalar\n(" + dtype + b"C\x02" + content + b"tRs."
    )
    assert load("geneformer").read_dictionary(tmp_path / "numbers.pkl", int) == {"a": -2}


# ---- what is refused


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.how = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.how


def persistent(folder: Path) -> bytes:
    return b"\x80\x04\x8c\x01aQ."


def calling(function: Callable[..., object], *arguments: object) -> Callable[[Path], bytes]:
    return lambda folder: pickle.dumps({"a": Call(function, *arguments)})


def touching(folder: Path) -> bytes:
    return pickle.dumps(
        {"a": Call(Path.touch, folder / "touched"), "b": Call(exec, f"open({str(folder / 'touched')!r}, 'w')")}
    )


def set_on_the_class(folder: Path) -> bytes:
    """It sets an attribute of the class that stands for a number of numpy's."""
    return b"\x80\x03cnumpy.core.multiarray\nscalar\nN}X\x01\x00\x00\x00aK\x01s\x86b."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (touching, "no pickle of a plain dictionary: it would import pathlib"),
        (calling(exec, "raise SystemExit"), "it would import builtins.exec"),
        (calling(getattr, "x", "upper"), "it would import builtins.getattr"),
        (calling(np.dtype, "O", False, True), "it holds numpy's 'O', no whole numbers"),
        (lambda folder: pickle.dumps({"a": np.float64(1)}), "it holds numpy's 'f8', no whole numbers"),
        (lambda folder: pickle.dumps({"a": np.arange(3)}), r"it would import numpy\._core"),
        (lambda folder: b"\x80\x03cnumpy.core.multiarray\nscalar\n(K\x01C\x01atR.", "a number of numpy's that is none"),
        (set_on_the_class, "no pickle of a plain dictionary"),
        (persistent, "it refers to an object outside of it, 'a'"),
        (lambda folder: b"\x80\x04\x82\x01.", "no pickle of a plain dictionary"),
        (lambda folder: b"no pickle", "no pickle of a plain dictionary"),
        (lambda folder: b"", "no pickle of a plain dictionary"),
        (lambda folder: pickle.dumps([1]), "not a dictionary from strings to int"),
        (lambda folder: pickle.dumps({1: 1}), "not a dictionary from strings to int"),
        (lambda folder: pickle.dumps({"a": True}), "not a dictionary from strings to int"),
        (lambda folder: pickle.dumps({"a": "b"}), "not a dictionary from strings to int"),
        (lambda folder: pickle.dumps({"a": {}}), "not a dictionary from strings to int"),
    ],
)
def test_a_pickle_of_anything_else_does_nothing(load, tmp_path, content, message):
    module, path = load("geneformer"), tmp_path / TOKENS
    path.write_bytes(content(tmp_path))
    with pytest.raises(contract.ContractError, match=message) as error:
        module.read_dictionary(path, int)
    assert str(error.value).startswith(str(path))
    assert not (tmp_path / "touched").exists()
    assert not hasattr(module.Number, "a")


def test_a_malicious_pickle_is_one_by_the_usual_way(published):
    """Else the test above would show nothing."""
    assert not (published / "touched").exists()
    pickle.loads(touching(published))  # noqa: S301 - ours
    assert (published / "touched").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / SYMBOLS).unlink(), r"0 files gene_name_id_dict\*\.pkl"),
        (lambda folder: (folder / "token_dictionary_gc30M.pkl").touch(), r"2 files token_dictionary\*\.pkl"),
        (lambda folder: write(folder, gene_of={"AAA": 4}), "not a dictionary from strings to str"),
        (lambda folder: write(folder, gene_of={"AAA": "other"}), "no symbol has an Ensembl id that is a token"),
        (lambda folder: write(folder, token_of={"ENSG1": 8}), "AAA is token 8 of 8"),
        (lambda folder: write(folder, token_of={"ENSG1": -1}), "AAA is token -1 of 8"),
        (lambda folder: write(folder, other=np.zeros((8, 5))), f"there is no {TENSOR}"),
        (lambda folder: write(folder, **{TENSOR: np.zeros(8)}), r"has shape \(8,\)"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{}"), "no safetensors of plain numbers"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors of plain numbers"),
    ],
)
def test_files_that_are_no_such_are_refused(made, published, change, message):
    change(published)
    with pytest.raises(contract.ContractError, match=message):
        made()


def test_a_wrong_setting_is_named(made):
    with pytest.raises(contract.ContractError, match="settings: layer: unknown; there are none"):
        made(layer=3)


# ---- as the project runs it


def test_the_catalogs_embedding_is_made_by_a_process(
    made, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(embed, "embed", embed.embed.fn)
    name = "geneformer_v2_104m"
    weights = sources.fetch_pretrained.fn(open_catalog().pretrained(name), published)
    folder = embed.make_shared_embedding(open_catalog().embedding("geneformer"), {name: weights})
    assert (folder / "embedding.parquet").read_bytes() == made().read_bytes()


def test_the_files_of_the_catalog_are_what_is_read():
    spec = open_catalog().embedding("geneformer")
    assert spec.pretrained is not None
    assert set(open_catalog().pretrained(spec.pretrained).files) == {"model.safetensors", TOKENS, SYMBOLS}


def test_its_progress_reaches_its_end(made, capsys):
    made()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "event": "progress",
        "done": 1,
        "total": 1,
        "unit": "table",
    }
