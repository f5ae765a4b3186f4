"""Planted passwords and keys are used and shown nowhere: in no file, database, log, artifact, answer or output."""

from __future__ import annotations

import base64
import gzip
import json
import os
import secrets
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pandas as pd
import pytest
import yaml

from blocks.config import child_environment
from blocks.config.secrets import MLFLOW, S3_KEY, S3_SECRET

MODEL = "ridge_coexpression"
# What the API tells of everything that it keeps, page by page.
KEPT = (
    *("flows", "flow_runs", "task_runs", "logs", "artifacts", "deployments", "variables", "work_pools"),
    *("block_documents", "block_types", "automations"),
)
RUN = """
import json, sys
from flows.benchmark import benchmark
print("RESULT", benchmark(**json.loads(sys.argv[1])))
"""


class Place(NamedTuple):
    """A text that somebody may read: where it stands, and its bytes."""

    name: str
    content: bytes


class Ran(NamedTuple):
    """What was done with planted values. values: by what they are; output: of each run, by what it was."""

    values: dict[str, str]
    folders: list[Path]
    output: dict[str, subprocess.CompletedProcess[str]]


def spellings(value: str) -> list[bytes]:
    """A value as it is, and as it stands in base64 behind 0, 1 or 2 bytes of something else."""
    plain = value.encode()
    # Four characters of base64 are three bytes: what is left out at either end depends on the neighbours.
    encoded = [base64.b64encode(bytes(before) + plain)[4 * (before > 0) :] for before in range(3)]
    return [plain, *(text.rstrip(b"=")[:-4] for text in encoded)]


def shown(places: Iterable[Place], values: dict[str, str]) -> set[tuple[str, str]]:
    """(place, which value) wherever a value can be read."""
    wanted = [(name, text) for name, value in values.items() for text in spellings(value)]
    return {(place.name, name) for place in places for name, text in wanted if text in place.content}


def in_files(folders: list[Path]) -> Iterator[Place]:
    """Every file as its bytes, and what of it is packed: tables, databases, AnnData, gzip."""
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        yield Place(str(path), path.read_bytes())
        yield Place(str(path), bytes(path.name, "utf-8"))
        yield from (Place(f"{path} unpacked", text) for text in unpacked(path))


def unpacked(path: Path) -> Iterator[bytes]:
    if path.suffix == ".parquet":
        yield pd.read_parquet(path).to_csv().encode()
    elif path.suffix == ".gz":
        yield gzip.decompress(path.read_bytes())
    elif path.suffix == ".db":
        # One database may be in use: it is read as it is, without a lock.
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            yield "\n".join(database.iterdump()).encode(errors="replace")
    elif path.suffix == ".h5ad":
        import h5py

        texts: list[str] = []
        with h5py.File(path) as file:
            file.visititems(lambda name, item: texts.extend([name, *texts_of(item)]))
        yield "\n".join(texts).encode()


def texts_of(item: object) -> list[str]:
    """The texts of a data set of HDF5, and the attributes of anything there."""
    import h5py

    texts = [str(value) for value in item.attrs.values()]  # type: ignore[attr-defined]
    if isinstance(item, h5py.Dataset) and h5py.check_string_dtype(item.dtype):
        content = item.asstr()[()]
        texts += [content] if isinstance(content, str) else [str(text) for text in content.ravel()]
    return texts


def in_prefect(api: str) -> Iterator[Place]:
    for kind in KEPT:
        offset = 0
        while True:
            answer = httpx.post(f"{api}/{kind}/filter", json={"limit": 200, "offset": offset}, timeout=60)
            rows = answer.raise_for_status().json()
            yield Place(f"Prefect {kind}", answer.content)
            offset += len(rows)
            if len(rows) < 200:
                break
        if kind in ("flow_runs", "logs"):
            assert offset > 0, f"Prefect knows no {kind}"
    answer = httpx.post(f"{api}/events/filter", json={"limit": 50}, timeout=60).raise_for_status()
    yield Place("Prefect events", answer.content)
    while following := answer.json()["next_page"]:
        answer = httpx.get(following, timeout=60).raise_for_status()
        yield Place("Prefect events", answer.content)


def everything(ran: Ran, servers: child_environment.Services) -> Iterator[Place]:
    yield from in_files(ran.folders)
    yield from in_prefect(servers.prefect_api)
    for name, done in ran.output.items():
        yield Place(f"output of: {name}", (done.stdout + done.stderr).encode())


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, Any]]:
    """Address of a local S3 server, and its owner's file system with a private bucket `screens`."""
    import s3fs
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    endpoint = "http://{}:{}".format(*running.get_host_and_port())
    owner = s3fs.S3FileSystem(
        endpoint_url=endpoint, skip_instance_cache=True, **dict.fromkeys(["key", "secret"], "owner")
    )
    owner.makedirs("screens", exist_ok=True)
    yield endpoint, owner
    running.stop()


@pytest.fixture(scope="module")
def blocks(servers: child_environment.Services) -> Iterator[Callable[[dict[str, str]], None]]:
    """A function that makes Secret blocks, as docs/secrets.md says; they are gone at the end."""
    made: set[str] = set()

    def change(code: str, values: dict[str, str]) -> None:
        subprocess.run(
            [sys.executable, "-c", f"import json, sys\nfrom prefect.blocks.system import Secret\n{code}"],
            env=child_environment.build_child_environment(servers),
            input=json.dumps(values),
            text=True,
            check=True,
            timeout=120,
        )

    def make(values: dict[str, str]) -> None:
        change(
            "for name, value in json.load(sys.stdin).items(): Secret(value=value).save(name, overwrite=True)", values
        )
        made.update(values)

    yield make
    change("for name in json.load(sys.stdin): Secret.delete(name)", dict.fromkeys(made, ""))


@pytest.fixture(scope="module")
def ran(
    servers: child_environment.Services,
    screen: Path,
    bucket: tuple[str, Any],
    blocks: Callable[[dict[str, str]], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Ran:
    """A benchmark whose raw file and store lie in private buckets, and runs that fail, with all their secrets."""
    endpoint, owner = bucket
    owner.pipe_file("screens/screen.h5ad", screen.read_bytes())
    kinds = ("S3 key", "S3 secret", "MLflow password", "MLflow password in a block", "URL password", "API password")
    values = {kind: f"planted{secrets.token_hex(20)}" for kind in kinds}
    blocks({S3_KEY: values["S3 key"], S3_SECRET: values["S3 secret"]})
    blocks(dict(zip(MLFLOW.values(), ["somebody", values["MLflow password in a block"]], strict=True)))
    home, data = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("guarded")
    temporary = tmp_path_factory.mktemp("temporary")
    kept = {
        name: value
        for name, value in child_environment.build_child_environment(servers).items()
        if not name.startswith("AWS_")
    }
    environment = kept | {
        "CALIPERT_DATA": str(data),
        "CALIPERT_STORE": "s3://screens/store",
        "AWS_ENDPOINT_URL": endpoint,
        # Nothing but the blocks can open the bucket.
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(home),
        "TMPDIR": str(temporary),
        # What is said only to those who look for faults must not show it either.
        "PREFECT_LOGGING_LEVEL": "DEBUG",
        "PREFECT_API_AUTH_STRING": f"somebody:{values['API password']}",
    }
    password = {"MLFLOW_TRACKING_USERNAME": "somebody", "MLFLOW_TRACKING_PASSWORD": values["MLflow password"]}
    address = servers.mlflow.replace("http://", f"http://somebody:{values['URL password']}@")

    def run(key: str, **more: str) -> subprocess.CompletedProcess[str]:
        name = Path(key).stem
        entry = home / f"guarded_{name}.yaml"
        source = {"kind": "s3", "url": f"s3://{key}", "endpoint": endpoint, "anonymous": False}
        labels = {"column": "perturbation", "control": ["control"]}
        about = {"name": entry.stem, "title": "a screen in a private bucket", "task": "single", "source": source}
        text = about | {"labels": labels, "min_genes_per_cell": 20, "half_seeds": 2, "folds": 2}
        entry.write_text(yaml.safe_dump(text))
        return subprocess.run(
            [sys.executable, "-c", RUN, json.dumps({"dataset": str(entry), "models": [MODEL]})],
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    output = {
        "whole": run("screens/screen.h5ad", **password),
        "again, with the blocks of MLflow": run("screens/screen.h5ad"),
        "password in an address": run("screens/screen.h5ad", MLFLOW_TRACKING_URI=address),
        "wrong bucket": run("elsewhere/nothing.h5ad", **password),
    }
    folders = [data, home, temporary, Path(os.environ["CALIPERT_DATA"])]
    return Ran(values, folders, output)


def test_a_private_bucket_is_opened_with_the_blocks(ran: Ran) -> None:
    for name in ("whole", "again, with the blocks of MLflow"):
        assert ran.output[name].returncode == 0, ran.output[name].stderr[-4000:]
        report = Path(ran.output[name].stdout.rpartition("RESULT ")[2].strip()) / "report.html"
        assert report.is_file()
    assert list(ran.folders[0].glob("downloads/guarded_screen/*/screen.h5ad"))


@pytest.mark.parametrize(
    ("run", "says"),
    [("password in an address", "a user name or password for 127.0.0.1"), ("wrong bucket", "s3://elsewhere/nothing")],
)
def test_what_is_refused_is_named(ran: Ran, run: str, says: str) -> None:
    assert ran.output[run].returncode == 1
    assert says in ran.output[run].stderr


def test_nothing_shows_a_planted_value(ran: Ran, servers: child_environment.Services, bucket: tuple[str, Any]) -> None:
    _, owner = bucket
    stored = owner.find("screens/store")
    assert stored, "the store was not in the bucket"
    objects = (Place(name, f"{name}\n".encode() + owner.cat_file(name)) for name in stored)
    assert shown(chain(everything(ran, servers), objects), ran.values) == set()


LEAK = """
import base64, os, sys, sqlite3
from pathlib import Path
import pandas as pd
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact

value, folder = os.environ["LEAKED"], Path(sys.argv[1])
encoded = base64.b64encode(f"user:{value}".encode()).decode()

@task(name="leaking task", task_run_name=f"leak-{value}")
def step():
    pass

@flow(name="leaking")
def leaking(parameter: str) -> None:
    get_run_logger().info("the header is: Basic %s", encoded)
    create_markdown_artifact(key="leaking", markdown=f"the password is {value}")
    step()

leaking(value)
folder.mkdir()
pd.DataFrame({"text": [value]}).to_parquet(folder / "table.parquet", compression="gzip")
import anndata, numpy
anndata.AnnData(numpy.ones((1, 1)), uns={"note": value}).write_h5ad(folder / "cells.h5ad", compression="gzip")
(folder / "log.txt").write_text(encoded)
(folder / value).touch()
with sqlite3.connect(folder / "some.db") as database:
    database.execute("create table t (text)")
    database.execute("insert into t values (?)", [value])
print(value[:-1])
print(value)
"""


def test_the_same_search_finds_what_does_leak(servers: child_environment.Services, tmp_path: Path) -> None:
    value = f"planted{secrets.token_hex(20)}"
    done = subprocess.run(
        [sys.executable, "-c", LEAK, str(tmp_path / "leaks")],
        env=child_environment.build_child_environment(servers) | {"LEAKED": value},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    own = Ran({"it": value}, [tmp_path, Path(os.environ["CALIPERT_DATA"])], {"leak": done})
    found = {place for place, _ in shown(everything(own, servers), own.values)}
    folder = tmp_path / "leaks"
    files = ["table.parquet unpacked", "cells.h5ad unpacked", "log.txt", "some.db", "some.db unpacked", value]
    wanted = {"output of: leak", *(str(folder / name) for name in files)}
    wanted |= {f"Prefect {kind}" for kind in ("flow_runs", "task_runs", "logs", "artifacts")}
    wanted |= {f"{os.environ['CALIPERT_DATA']}/prefect/prefect.db unpacked"}
    assert wanted <= found


@pytest.mark.parametrize("before", range(3))
@pytest.mark.parametrize("length", range(20, 24))
def test_a_value_is_found_in_base_64_wherever_it_stands(before: int, length: int) -> None:
    value = secrets.token_hex(20)[:length]
    header = base64.b64encode(b"u" * before + value.encode() + b"\xff\xfe\xfd")
    assert shown([Place("header", header)], {"it": value}) == {("header", "it")}
    other = base64.b64encode(b"u" * before + secrets.token_hex(20)[:length].encode())
    assert shown([Place("header", other)], {"it": value}) == set()
