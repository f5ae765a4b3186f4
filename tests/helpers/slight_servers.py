"""Servers as slight as can be in place of Prefect's and MLflow's, and what runs of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from blocks.services import stack as services

FAKE = """
import subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[1]")
    do_POST = do_GET

print("fake server starts", flush=True)
if "--helper" in sys.argv:
    # In a session of its own, as Prefect's worker runs its flows.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def fake(port: int, *extra: str) -> list[str]:
    return ["-c", FAKE, str(port), *extra]


def serve_with(monkeypatch: pytest.MonkeyPatch, command: Callable[[int], list[str]]) -> None:
    rows = tuple(replace(server, port=0, command=command) for server in services.SERVERS)
    monkeypatch.setattr(services, "SERVERS", rows)


def recorded(data: Path) -> dict[str, psutil.Process]:
    rows = json.loads((data / "services.json").read_text(encoding="utf-8"))
    return {row["name"]: psutil.Process(row["pid"]) for row in rows}


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
