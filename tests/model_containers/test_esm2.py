from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file
from scipy.special import erf

from blocks.config.catalog import open_catalog
from model_containers import contract
from tasks import embed, sources

AMINO_ACIDS = "LAGVSERTIDPKQNFYMHWCXBUZO"
VOCABULARY = ["<cls>", "<pad>", "<eos>", "<unk>", *AMINO_ACIDS, ".", "-", "<null_1>", "<mask>"]
WIDTH, HIDDEN, LAYERS, HEADS, EPSILON = 16, 24, 2, 2, 1e-5
# Published ones differ in size alone.
CONFIG = {
    "architectures": ["EsmForMaskedLM"],
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": None,
    "emb_layer_norm_before": False,
    "esmfold_config": None,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": HIDDEN,
    "is_folding_model": False,
    "layer_norm_eps": EPSILON,
    "mask_token_id": 32,
    "max_position_embeddings": 1026,
    "model_type": "esm",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 1,
    "position_embedding_type": "rotary",
    "token_dropout": True,
    "torch_dtype": "float32",
    "transformers_version": "4.25.0.dev0",
    "use_cache": True,
    "vocab_list": None,
    "vocab_size": 33,
}
CANONICAL = "Homo_sapiens.GRCh38.113.canonical.tsv.gz"
PROTEINS = "Homo_sapiens.GRCh38.pep.all.fa.gz"
# Gene, transcript, where, symbol, protein.
GENES = [
    ("ENSG01.3", "ENST01.1", "chromosome:GRCh38:1:100:200:1", "AAA", "MKTAYIAKQR" * 3),
    ("ENSG02.1", "ENST02.1", "chromosome:GRCh38:X:100:200:-1", "BBB", "MU*X" + "GGG"),
    ("ENSG03.1", "ENST03.2", "chromosome:GRCh38:MT:1:9:1", "CCC", "W"),
    ("ENSG04.1", "ENST04.1", "chromosome:GRCh38:2:1:9:1", "DDD", "MPEPTIDE"),
    ("ENSG05.1", "ENST05.1", "chromosome:GRCh38:2:1:9:1", None, "MNAMELESS"),
    ("ENSG06.1", "ENST06.1", "chromosome:GRCh38:2:1:9:1", "LONG", "M" * 15_001),
    # One symbol, several genes.
    ("ENSG10.1", "ENST10.1", "chromosome:GRCh38:CHR_HSCHR7_2_CTG6:1:9:1", "TWICE", "MPATCH"),
    ("ENSG11.1", "ENST11.1", "scaffold:GRCh38:HG2290_PATCH:1:9:1", "TWICE", "MALSOAPATCH"),
    ("ENSG13.1", "ENST13.1", "chromosome:GRCh38:22:1:9:1", "TWICE", "MLATER"),
    ("ENSG12.1", "ENST12.1", "chromosome:GRCh38:9:1:9:1", "TWICE", "MCHRSMNINE"),
]
OTHER = ("ENSG01.3", "ENST99.1", "chromosome:GRCh38:1:100:200:1", "AAA", "MNTCANNICAL")


def record(gene: str, transcript: str, where: str, symbol: str | None, sequence: str) -> str:
    named = f" gene_symbol:{symbol}" if symbol else ""
    about = f"description:of gene_symbol:WRONG [Source:HGNC Symbol;Acc:HGNC:{gene}]"
    lines = "\n".join(sequence[start : start + 60] for start in range(0, len(sequence), 60))
    biotypes = "gene_biotype:protein_coding transcript_biotype:protein_coding"
    return f">ENSP{transcript[4:]} pep {where} gene:{gene} transcript:{transcript} {biotypes}{named} {about}\n{lines}\n"


def write_genes(folder: Path, records: list[tuple[str, str, str, str | None, str]]) -> None:
    canonical = [(gene, transcript, "Ensembl Canonical") for gene, transcript, *_ in records if transcript != OTHER[1]]
    text = "".join("\t".join(line) + "\n" for line in canonical)
    (folder / CANONICAL).write_bytes(gzip.compress(text.encode(), mtime=0))
    (folder / PROTEINS).write_bytes(gzip.compress("".join(record(*one) for one in records).encode(), mtime=0))


def write_checkpoint(folder: Path) -> None:
    """A tiny ESM-2 of random weights, with the files and names of the published ones."""
    draw = np.random.default_rng(0)
    tensors = {
        "esm.embeddings.word_embeddings.weight": draw.normal(size=(33, WIDTH)),
        "esm.embeddings.position_embeddings.weight": draw.normal(size=(1026, WIDTH)),
        "esm.contact_head.regression.weight": draw.normal(size=(1, LAYERS * HEADS)),
        "esm.contact_head.regression.bias": draw.normal(size=1),
        "lm_head.bias": draw.normal(size=33),
    }
    for name, out, width in [("lm_head.dense", WIDTH, WIDTH)] + [
        (f"esm.encoder.layer.{layer}.{part}", out, width)
        for layer in range(LAYERS)
        for part, out, width in (
            ("attention.self.query", WIDTH, WIDTH),
            ("attention.self.key", WIDTH, WIDTH),
            ("attention.self.value", WIDTH, WIDTH),
            ("attention.output.dense", WIDTH, WIDTH),
            ("intermediate.dense", HIDDEN, WIDTH),
            ("output.dense", WIDTH, HIDDEN),
        )
    ]:
        tensors |= {f"{name}.weight": draw.normal(size=(out, width)), f"{name}.bias": draw.normal(size=out)}
    norms = [f"layer.{layer}.{part}" for layer in range(LAYERS) for part in ("LayerNorm", "attention.LayerNorm")]
    for name in ["lm_head.layer_norm", *(f"esm.encoder.{part}" for part in [*norms, "emb_layer_norm_after"])]:
        tensors |= {f"{name}.weight": draw.normal(1, 0.3, WIDTH), f"{name}.bias": draw.normal(size=WIDTH)}
    for layer in range(LAYERS):
        width = WIDTH // HEADS
        angles = 1 / 10_000 ** (np.arange(0, width, 2) / width)
        tensors[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = angles
    whole = {name: values.astype(np.float32) for name, values in tensors.items()}
    positions = {"esm.embeddings.position_ids": np.arange(1026)[None]}
    save_file(whole | positions, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """All files that the embedding is made of."""
    folder = tmp_path / "published"
    folder.mkdir()
    write_checkpoint(folder)
    write_genes(folder, [OTHER, *GENES])
    return folder


@pytest.fixture
def made(load, published: Path, tmp_path: Path) -> Callable[..., Path]:
    """The file that it writes."""

    def make(name: str = "output", **settings: object) -> Path:
        output = tmp_path / name
        output.mkdir()
        load("esm2").embed(contract.EmbedTask(published, settings, 1, output))
        return output / "embedding.parquet"

    return make


def test_it_goes_on_where_it_was_killed(load, published, tmp_path, monkeypatch, capsys):
    """After each batch the vectors are kept, as the bits that they are; what cannot be read is made anew."""
    model = load("esm2")
    proteins = model.sequences_of(published)
    monkeypatch.setattr(model, "TOKENS", max(map(len, proteins.values())) + 2)
    sizes = list(map(len, model.batches(proteins)))
    assert sizes[0] == 1
    assert sum(sizes) > sizes[0] + sizes[1] > 2
    kept = tmp_path / "kept"
    runs: list[int] = []
    kept.mkdir()
    pool = model.pool_states

    def counted(states, n_residues, pooling):
        runs.append(n_residues)
        return pool(states, n_residues, pooling)

    def pooled(*given):
        if len(runs) == sizes[0] + sizes[1]:
            raise KeyboardInterrupt
        return counted(*given)

    def run(name, checkpoint=kept):
        (tmp_path / name).mkdir()
        model.embed(contract.EmbedTask(published, {}, 1, tmp_path / name, checkpoint))
        return (tmp_path / name / "embedding.parquet").read_bytes()

    whole = run("whole", None)
    monkeypatch.setattr(model, "pooled", pooled)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    assert sorted(path.name for path in kept.iterdir()) == ["cpu-0.npy", "cpu-1.npy"]
    (kept / "cpu-0.npy").write_bytes(b"torn")
    # What a GPU has made is not taken.
    (kept / "cuda-2.npy").write_bytes((kept / "cpu-1.npy").read_bytes())
    monkeypatch.setattr(model, "pooled", counted)
    runs.clear()
    capsys.readouterr()
    assert run("again") == whole
    assert len(runs) == len(proteins) - sizes[1]
    assert "kept in cpu-0.npy cannot be read" in capsys.readouterr().out


# ---- the same by hand


def states_by_hand(folder: Path, sequence: str) -> np.ndarray:
    """The last hidden states of one protein's tokens in float64, from the paper: layer norm before attention and before
    the hidden layer, rotary positions, GELU; embeddings scaled by what training's masks leave of them."""
    tensors = {
        name.removeprefix("esm."): x.astype(np.float64) for name, x in load_file(folder / "model.safetensors").items()
    }

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPSILON)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def turned(x: np.ndarray) -> np.ndarray:
        half = x.shape[1] // 2
        angle = np.arange(len(x))[:, None] / 10_000 ** (np.arange(half) / half)
        first, second = x[:, :half], x[:, half:]
        return np.hstack(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
        )

    tokens = [VOCABULARY.index(token) if token in VOCABULARY else 3 for token in ["<cls>", *sequence, "<eos>"]]
    x = tensors["embeddings.word_embeddings.weight"][tokens] * (1 - 0.15 * 0.8)
    width = WIDTH // HEADS
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        q, k, v = (
            linear(norm(x, f"{at}.attention.LayerNorm"), f"{at}.attention.self.{part}")
            for part in ("query", "key", "value")
        )
        heads = []
        for head in range(HEADS):
            own = slice(head * width, (head + 1) * width)
            weights = np.exp(turned(q[:, own]) @ turned(k[:, own]).T / np.sqrt(width))
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, own])
        x = x + linear(np.hstack(heads), f"{at}.attention.output.dense")
        hidden = linear(norm(x, f"{at}.LayerNorm"), f"{at}.intermediate.dense")
        x = x + linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, f"{at}.output.dense")
    return norm(x, "encoder.emb_layer_norm_after")


POOLED = {
    "mean": lambda states: states[1:-1].mean(axis=0),
    "bos": lambda states: states[0],
    "sum": lambda states: states[1:-1].sum(axis=0),
    "max": lambda states: states[1:-1].max(axis=0),
}


@pytest.mark.parametrize("pooling", POOLED)
def test_the_states_of_each_protein_are_pooled(made, published, pooling):
    """In batches with others, filled up."""
    table = pd.read_parquet(made(pooling=pooling))
    assert table.columns.tolist() == [f"d{column}" for column in range(16)]
    assert table.index.tolist() == ["AAA", "BBB", "CCC", "DDD", "TWICE"]
    sequences = {symbol: sequence for _, _, _, symbol, sequence in GENES} | {"TWICE": "MCHRSMNINE"}
    for symbol, row in table.iterrows():
        expected = POOLED[pooling](states_by_hand(published, sequences[symbol]))
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_mean_is_what_is_pooled_by(made):
    assert made("one").read_bytes() == made("two", pooling="mean").read_bytes()


def test_bytes_do_not_depend_on_the_order_of_the_files(made, published):
    before = made("one").read_bytes()
    write_genes(published, [OTHER, *GENES][::-1])
    assert made("two").read_bytes() == before


def test_batches_are_of_like_lengths_and_few_tokens(load, monkeypatch):
    esm2 = load("esm2")
    monkeypatch.setattr(esm2, "TOKENS", 20)
    sequences = {"b": "MM", "a": "MM", "c": "M" * 18, "d": "MMM", "e": "M" * 7, "f": "M", "g": "MM", "h": "MM"}
    assert list(esm2.batches(sequences)) == [["c"], ["e", "d"], ["a", "b", "g", "h", "f"]]


def test_the_longest_protein_fits_a_batch(load):
    esm2 = load("esm2")
    sequences = {"a": "M" * esm2.LONGEST, "b": "M"}
    assert list(esm2.batches(sequences)) == [["a"], ["b"]]


def test_residues_are_the_tokens_of_the_published_tokenizer(load, published):
    """Except that this one takes unknown residues together where several stand side by side: here each is a token."""
    from transformers import EsmTokenizer

    esm2 = load("esm2")
    vocabulary = esm2.read_vocabulary(published / "vocab.txt")
    tokenizer = EsmTokenizer(published / "vocab.txt")
    assert esm2.token_ids(AMINO_ACIDS + "JM*K", vocabulary) == tokenizer(AMINO_ACIDS + "JM*K")["input_ids"]
    assert esm2.token_ids("**", vocabulary) == [0, 3, 3, 2]


def test_a_gene_has_one_canonical_transcript(load):
    found = load("esm2").canonical_transcripts
    assert found(["gene_stable_id\ttranscript_stable_id\tlabel", "G1.1\tT1.2\tEnsembl Canonical", "G2.1\tT3.1"]) == {
        "transcript_stable_id",
        "T1",
        "T3",
    }
    several = ["G1\tT1\tMANE Plus Clinical", "G1\tT3\tEnsembl Canonical", "G1\tT2\tEnsembl Canonical"]
    assert found(several) == found(several[::-1]) == {"T2"}


def test_progress_and_what_is_too_long_are_told(made, capsys):
    made()
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[0] == {"event": "log", "message": "left out, for more than 15,000 residues: LONG"}
    assert events[-1] == {"event": "progress", "done": 5, "total": 5, "unit": "protein"}


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "median"}, "settings: pooling: 'median' is none of mean, bos, sum, max"),
        ({"pooling": 1}, "settings: pooling: 1 is of another type"),
        ({"layer": 3}, "settings: layer: unknown; there are pooling"),
    ],
)
def test_a_wrong_setting_is_named(made, settings, message):
    with pytest.raises(contract.ContractError, match=message):
        made(**settings)


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def set_config(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["esm.encoder.layer.1.output.dense.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_pickle(folder: Path) -> None:
    import torch

    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def move(folder: Path) -> None:
    (folder / "again.pep.all.fa.gz").write_bytes((folder / PROTEINS).read_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(CANONICAL), r"0 files \*\.canonical\.tsv\.gz"),
        (move, r"2 files \*\.pep\.all\.fa\.gz"),
        (write(PROTEINS, b"plain"), f"{PROTEINS}: no gzipped text"),
        (write(PROTEINS, gzip.compress(b"no proteins\n")), "no protein of a canonical transcript"),
        (write(CANONICAL, gzip.compress(b"ENSG01\tENST01\n" * 99)[:20]), f"{CANONICAL}: no gzipped text"),
        (drop("vocab.txt"), r"vocab\.txt: not readable"),
        (write("vocab.txt", b"<cls> <pad> <eos>"), "there is no token <unk>"),
        (write("vocab.txt", b"<cls> <pad> <eos> <unk> A"), "5 tokens; the network has 33"),
        (drop("config.json"), r"config\.json: not readable"),
        (write("config.json", b"{"), r"config\.json: not readable"),
        (write("config.json", b"[]"), "no ESM-2: model_type is not 'esm'"),
        (set_config(position_embedding_type="absolute"), "no ESM-2: position_embedding_type is not 'rotary'"),
        (
            set_config(intermediate_size=32),
            r"encoder\.layer\.0\.intermediate\.dense\.bias is \(24,\); config\.json wants \(32,\)",
        ),
        (write("model.safetensors", b"{}"), "no checkpoint of ESM-2"),
        (drop_tensor, r"it has no encoder\.layer\.1\.output\.dense\.bias"),
        (write_pickle, "no checkpoint of ESM-2"),
    ],
)
def test_files_that_are_no_such_are_refused(made, published, change, message):
    change(published)
    with pytest.raises(contract.ContractError, match=message):
        made()


# ---- as the project runs it


def test_the_catalogs_embedding_is_made_by_a_process_without_a_network(
    load, made, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALIPERT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("CALIPERT_GPUS", "none")
    monkeypatch.setattr(embed, "embed", embed.embed.fn)
    spec = open_catalog().embedding("esm2")
    weights = sources.fetch_pretrained.fn(open_catalog().pretrained("esm2_150m"), published)
    folder = embed.make_shared_embedding(spec, {"esm2_150m": weights})
    table = pd.read_parquet(folder / "embedding.parquet")
    pd.testing.assert_frame_equal(table, pd.read_parquet(made()), rtol=1e-5, atol=1e-5)


def test_sharded_weights_are_read(made, published):
    """As those of 3B parameters are published."""
    whole = made("whole").read_bytes()
    tensors = load_file(published / "model.safetensors")
    parts = {
        "model-00001-of-00002.safetensors": sorted(tensors)[:9],
        "model-00002-of-00002.safetensors": sorted(tensors)[9:],
    }
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, published / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    (published / "model.safetensors.index.json").write_text(json.dumps(index))
    (published / "model.safetensors").unlink()
    assert made("sharded").read_bytes() == whole


@pytest.mark.parametrize("name", ["esm2", "esm2_3b"])
def test_the_files_of_the_catalog_are_what_is_read(load, name):
    spec = open_catalog().embedding(name)
    assert spec.container == "esm2"
    assert spec.pretrained is not None
    files = set(open_catalog().pretrained(spec.pretrained).files)
    shards = {file for file in files if file.startswith("model-0")}
    weights = {"model.safetensors.index.json", *shards} if shards else {"model.safetensors"}
    assert files == {CANONICAL, PROTEINS, "config.json", "vocab.txt", *weights}
    if shards:
        (count,) = {int(file[-17:-12]) for file in shards}
        assert shards == {f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)}
