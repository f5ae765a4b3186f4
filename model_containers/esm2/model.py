"""ESM-2 (Lin et al. 2023): what a protein language model makes of the canonical protein of each gene.

The proteins are Ensembl's, the weights those that Meta publishes. README.md says which protein represents a gene, and
what is left out.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import contract
import neural

if not TYPE_CHECKING:
    np, pd, torch = map(contract.LateModule, ("numpy", "pandas", "torch"))
else:
    import numpy as np
    import pandas as pd
    import torch


DESCRIPTION = contract.Description(name="esm2", combinations=False, embedding=False, gpu=True, input="files")
POOLINGS = ("mean", "bos", "sum", "max")
LONGEST = 15_000
# Tokens of a batch, padding included: one protein of the longest has fewer.
TOKENS = 16_384
BEGINNING, END, PADDING, UNKNOWN = "<cls>", "<eos>", "<pad>", "<unk>"
# Patches and alternative haplotypes have longer names.
CHROMOSOME = re.compile(r"\d{1,2}|X|Y|MT")
# What a checkpoint may lack: a part for another task, and angles that follow from the width.
NOT_NEEDED = ("contact_head.", "rotary_embeddings.inv_freq")


@dataclass(frozen=True)
class Settings:
    """pooling of the last hidden states: mean, sum or max over the residues, or bos, the state of the first token."""

    pooling: str = "mean"

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling: {self.pooling!r} is none of {', '.join(POOLINGS)}")


class Protein(NamedTuple):
    """The canonical protein of a gene. It sorts by its rank among the genes that share a symbol.

    elsewhere: it lies on a patch or an alternative haplotype, not on a chromosome. gene: its Ensembl id.
    """

    elsewhere: bool
    gene: str
    sequence: str


def embed(task: contract.EmbedTask) -> None:
    """Compute the pooled last hidden state of each symbol's protein."""
    pooling = contract.embedding_settings(task, Settings).pooling
    _, device = neural.start_torch(task.threads)
    sequences = sequences_of(task.pretrained)
    vocabulary = read_vocabulary(task.pretrained / "vocab.txt")
    net = network(task.pretrained, len(vocabulary), device)

    def vectors(symbols: list[str]) -> np.ndarray:
        tokens, real = pad_proteins(
            [token_ids(sequences[symbol], vocabulary) for symbol in symbols], vocabulary[PADDING]
        )
        with torch.no_grad():
            # float32 on every device: half precision would keep three digits of a mean over thousands of residues.
            states = net(input_ids=tokens.to(device), attention_mask=real.to(device)).last_hidden_state
        found = [pool_states(one, len(sequences[name]), pooling) for name, one in zip(symbols, states, strict=True)]
        return torch.stack(found).cpu().numpy()

    tables = []
    done = 0
    for number, symbols in enumerate(batches(sequences)):
        # A GPU computes other bits than a CPU: no table is half of one and half of the other.
        path = task.checkpoint / f"{device.type}-{number}.npy" if task.checkpoint else None
        tables.append(pd.DataFrame(read_or_make_vectors(path, partial(vectors, symbols)), index=symbols))
        done += len(symbols)
        contract.progress(done, len(sequences), "protein")
    contract.write_embedding(task, pd.concat(tables))


# ---- what lets a run go on that was killed: the vectors of each batch, in a file of its own


def read_or_make_vectors(path: Path | None, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Read the vectors of a batch as an earlier run kept them, else make them, and keep them if there is a place.

    The log names what cannot be read.
    """
    if path is not None and path.exists():
        try:
            earlier: np.ndarray = np.load(path, allow_pickle=False)
            return earlier
        except (OSError, ValueError, EOFError) as error:
            why = type(error).__name__
            contract.log(f"what an earlier run kept in {path.name} cannot be read ({why}), and is made again")
    vectors = make()
    if path is not None:
        unfinished = path.with_name(f"{path.name}.partial")
        with unfinished.open("wb") as file:
            np.save(file, vectors, allow_pickle=False)
        unfinished.replace(path)
    return vectors


# ---- proteins


def sequences_of(folder: Path) -> dict[str, str]:
    """Symbol -> the amino acids of its canonical protein, of at most LONGEST residues. The log names the longer ones.

    Of several genes with one symbol the one on a chromosome counts, else that of the smallest Ensembl id. Raises
    ContractError where there is none.
    """
    canonical = canonical_transcripts(lines_of(contract.only_file(folder, "*.canonical.tsv.gz")))
    fasta = contract.only_file(folder, "*.pep.all.fa.gz")
    proteins = proteins_of(lines_of(fasta), canonical)
    if not proteins:
        raise contract.ContractError(f"{fasta}: no protein of a canonical transcript of a gene with a symbol")
    too_long = sorted(symbol for symbol, protein in proteins.items() if len(protein.sequence) > LONGEST)
    if too_long:
        contract.log(f"left out, for more than {LONGEST:,} residues: {', '.join(too_long)}")
    return {symbol: protein.sequence for symbol, protein in proteins.items() if symbol not in too_long}


def canonical_transcripts(lines: Iterable[str]) -> set[str]:
    """Read the canonical transcript of each gene, without its version.

    lines: gene, transcript and a note, separated by tabs. Should a gene have several, one whose note says canonical
    counts, and of these the smallest.
    """
    of_gene: dict[str, tuple[bool, str]] = {}
    for line in lines:
        gene, transcript, note = [*line.split("\t"), "", ""][:3]
        found = ("canonical" not in note.lower(), without_version(transcript))
        of_gene[gene] = min(found, of_gene.get(gene, found))
    return {transcript for _, transcript in of_gene.values()}


def proteins_of(lines: Iterable[str], transcripts: set[str]) -> dict[str, Protein]:
    """Symbol -> protein, in a FASTA file of Ensembl's whose transcript is among these. Empty ones do not count."""
    found: dict[str, Protein] = {}
    for header, sequence in records(lines):
        # ENSP.. pep chromosome:GRCh38:14:start:end:1 gene:ENSG.. transcript:ENST.. .. gene_symbol:TRDD1 description:..
        parts = header.partition(" description:")[0].split()
        fields = dict(part.split(":", 1) for part in parts[3:] if ":" in part)
        transcript = without_version(fields.get("transcript", ""))
        if "gene_symbol" not in fields or transcript not in transcripts or not sequence:
            continue
        region = parts[2].split(":")[2:3]
        elsewhere = not (region and CHROMOSOME.fullmatch(region[0]))
        protein = Protein(elsewhere, without_version(fields.get("gene", "")), sequence)
        symbol = fields["gene_symbol"]
        found[symbol] = min(protein, found.get(symbol, protein))
    return found


def records(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(header without its `>`, sequence) of the records of a FASTA file."""
    header, sequence = "", list[str]()
    for line in lines:
        if line.startswith(">"):
            if header:
                yield header, "".join(sequence)
            header, sequence = line[1:], []
        else:
            sequence.append(line)
    if header:
        yield header, "".join(sequence)


def without_version(stable_id: str) -> str:
    """ENST00000415118.1 -> ENST00000415118."""
    return stable_id.partition(".")[0]


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a gzipped text, without their ends. Raises ContractError for another file."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield line.strip()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise contract.ContractError(f"{path}: no gzipped text: {error}") from None


# ---- the network


def network(folder: Path, n_tokens: int, device: Any) -> torch.nn.Module:
    """ESM-2 of a checkpoint, on the device. n_tokens: of its vocabulary.

    Raises ContractError unless all weights are there, in safetensors, and fit config.json: nothing is unpickled, and
    nothing stays random.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from safetensors import SafetensorError
    from transformers import EsmModel
    from transformers.utils import logging

    require_esm2(folder / "config.json")
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it would warn of is refused here
    try:
        loaded: Any = EsmModel.from_pretrained(
            folder,
            add_pooling_layer=False,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise contract.ContractError(f"{folder}: no checkpoint of ESM-2: {error}") from None
    net, about = loaded
    missing = sorted(name for name in about["missing_keys"] if not name.startswith(NOT_NEEDED))
    if missing:
        raise contract.ContractError(f"{folder}: no checkpoint of ESM-2: it has no {missing[0]}")
    for name, found, wanted in sorted(about["mismatched_keys"]):
        sizes = f"{name} is {tuple(found)}; config.json wants {tuple(wanted)}"
        raise contract.ContractError(f"{folder}: no checkpoint of ESM-2: {sizes}")
    if net.config.vocab_size != n_tokens:
        raise contract.ContractError(
            f"{folder / 'vocab.txt'}: {n_tokens} tokens; the network has {net.config.vocab_size}"
        )
    evaluated: torch.nn.Module = net.eval().to(device)
    return evaluated


def require_esm2(path: Path) -> None:
    """Raise ContractError unless a config.json is one of ESM-2: its forerunners have no rotary positions."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise contract.ContractError(f"{path}: not readable: {error}") from None
    wanted = {"model_type": "esm", "position_embedding_type": "rotary"}
    for field, value in wanted.items():
        if not isinstance(config, dict) or config.get(field) != value:
            raise contract.ContractError(f"{path}: no ESM-2: {field} is not {value!r}")


def read_vocabulary(path: Path) -> dict[str, int]:
    """Token -> its row. Raises ContractError where one is missing that every sequence needs."""
    try:
        tokens = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise contract.ContractError(f"{path}: not readable: {error}") from None
    for wanted in (BEGINNING, END, PADDING, UNKNOWN):
        if wanted not in tokens:
            raise contract.ContractError(f"{path}: there is no token {wanted}")
    return {token: row for row, token in enumerate(tokens)}


def token_ids(sequence: str, vocabulary: Mapping[str, int]) -> list[int]:
    """One token for each residue, between that of the beginning and that of the end. `*` and the like are unknown."""
    residues = (vocabulary.get(residue, vocabulary[UNKNOWN]) for residue in sequence)
    return [vocabulary[BEGINNING], *residues, vocabulary[END]]


def batches(sequences: Mapping[str, str]) -> Iterator[list[str]]:
    """Symbols by falling length, then by name, so many at a time that they have at most TOKENS tokens.

    Where a machine has too little memory, it shows at once.
    """
    order = sorted(sequences, key=lambda symbol: (-len(sequences[symbol]), symbol))
    while order:
        size = TOKENS // (len(sequences[order[0]]) + 2)
        yield order[:size]
        order = order[size:]


def pad_proteins(rows: list[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode proteins: tokens, padded to the longest, and 1 where there is no padding; both proteins x tokens."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, (torch.arange(width) < lengths[:, None]).long()


def pool_states(states: torch.Tensor, n_residues: int, pooling: str) -> torch.Tensor:
    """One vector (float64) of the states of a protein's tokens, tokens x width: beginning, residues, end, padding."""
    if pooling == "bos":
        return states[0].double()
    residues = states[1 : 1 + n_residues].double()
    if pooling == "max":
        return residues.amax(dim=0)
    return residues.sum(dim=0) if pooling == "sum" else residues.mean(dim=0)


if __name__ == "__main__":
    contract.main(DESCRIPTION, embed=embed)
