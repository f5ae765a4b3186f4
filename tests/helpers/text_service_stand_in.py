"""A service of text vectors on this machine, the catalog entry that names it, and small files of NCBI's layout."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

DIMENSIONS = 4
SECRET = "calipert-text-key"  # noqa: S105 - the name of a block


def vector(text: str, dimensions: int = DIMENSIONS) -> list[float]:
    """The vector that the service gives a text."""
    return [byte / 256 + 0.5 for byte in sha256(text.encode()).digest()[:dimensions]]


class Service:
    """What it was asked and with which headers; the next answers, each a function of the request, before it answers
    as it should."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.next: list[Callable[[dict[str, Any]], tuple[int, dict[str, str], Any]]] = []
        self.stalls_at: int | None = None
        self.go_on = threading.Event()

    @property
    def texts(self) -> list[str]:
        return [text for request in self.asked for text in request["input"]]

    def answer(self, request: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        data = [{"index": place, "embedding": vector(text)} for place, text in enumerate(request["input"])]
        # The order of the answers is nobody's promise.
        return 200, {}, {"object": "list", "data": data[::-1], "model": request["model"]}


@contextmanager
def serving() -> Iterator[Service]:
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/embeddings"
            service.asked.append(request)
            service.headers.append(dict(self.headers))
            if service.stalls_at == len(service.asked):
                service.go_on.wait(60)
                return
            reply = service.next.pop(0) if service.next else service.answer
            status, headers, content = reply(request)
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        service.url = f"http://127.0.0.1:{running.server_port}/v1"
        yield service
        service.go_on.set()
        running.shutdown()


def write_entry(catalog: Path, url: str, **changes: Any) -> None:
    """The entry `mine` of a catalog of the user's: an embedding by this service."""
    service = {"url": url, "model": "a-model", "secret": SECRET}
    about = {"name": "mine", "title": "by a service", "kind": "text", "pretrained": "ncbi_genes", "service": service}
    (catalog / "embeddings").mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({**about, "dimensions": DIMENSIONS, **changes})
    (catalog / "embeddings" / "mine.yaml").write_text(text)


def write_genes(folder: Path, texts: dict[str, str], backwards: bool = False) -> Path:
    """A folder with both files of NCBI: genes, by symbol, and their summaries."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(enumerate(texts.items(), start=1))[:: -1 if backwards else 1]
    summaries = [f"9606\t{number}\tRefSeq\t{text}" for number, (_, text) in rows]
    genes = [f"9606\t{number}\t{symbol}\tprotein-coding\t{symbol}" for number, (symbol, _) in rows]
    columns = "GeneID\tSymbol\ttype_of_gene\tSymbol_from_nomenclature_authority"
    for name, header, lines in (
        ("gene_summary.gz", "GeneID\tSource\tSummary", summaries),
        ("Homo_sapiens.gene_info.gz", columns, genes),
    ):
        text = "".join(f"{line}\n" for line in [f"#tax_id\t{header}", *lines])
        (folder / name).write_bytes(gzip.compress(text.encode(), mtime=0))
    return folder
