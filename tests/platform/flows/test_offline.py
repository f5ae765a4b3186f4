"""With the network closed nothing hangs, fails or complains; and nothing even tries to reach beyond this machine.

A run and its servers are watched twice: by a hook in every Python process, and, where a network namespace of its own is
permitted, by all packets of all processes. In that namespace there is loopback alone, and whatever is sent elsewhere
vanishes without an answer, which is the hardest kind of closed network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from blocks.config import child_environment
from tests.helpers.tiny_screen import ENTRY

# Put on the path of every Python process, which imports it when it starts.
HOOK = """
import json, os, sys

NAMES = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")


def note(event, host):
    line = json.dumps([event, host.decode() if isinstance(host, bytes) else host, sys.orig_argv[1:4]])
    with open(os.environ["WATCHED"], "a") as file:
        print(line, file=file)


def watch(event, args):
    if event in NAMES:
        # The first argument is a host, or the socket, which the address follows.
        target = args[0] if event.startswith("socket.get") else args[-1]
        note(event, target[0] if isinstance(target, tuple) else target)


sys.addaudithook(watch)
note("start", None)
"""
# Runs in the namespace: everything goes to loopback, where what is meant for elsewhere is seen and lost.
CLOSE = """
set -e
ip link set lo up
ip route add default dev lo
ip -6 route add default dev lo
"$1" -c "$2" "$3" &
watcher=$!
while ! [ -e "$3" ]; do sleep 0.1; done
shift 3
status=0
"$@" || status=$?
sleep 1
kill $watcher
exit $status
"""
PACKETS = """
import socket, sys

watched = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
watched.bind(("lo", 0))
with open(sys.argv[1], "w") as file:
    while True:
        packet = watched.recv(2048)
        six = packet[0] >> 4 == 6
        host = socket.inet_ntop(socket.AF_INET6, packet[24:40]) if six else socket.inet_ntoa(packet[16:20])
        head = 40 if six else 4 * (packet[0] & 15)
        port = int.from_bytes(packet[head + 2 : head + 4], "big")
        # A resolver may listen on this machine: what it is asked is meant for others.
        if port == 53 or not (host == "::1" or host.startswith("127.")):
            print(host, port, packet[head:head + 100], file=file, flush=True)
"""
# What is done while it is watched: the command line, its servers for some more seconds, and their end.
SESSION = """
import json, subprocess, sys, time

from blocks.services import stack as services

done = []
try:
    for command in json.loads(sys.argv[1]):
        done.append(subprocess.run([sys.executable, "-m", "flows.cli.main", *command], capture_output=True, text=True))
    # What a server does a while after its start.
    time.sleep(20)
finally:
    services.stop()
print(json.dumps([[one.returncode, one.stdout, one.stderr] for one in done]))
"""
COMPLAINTS = re.compile(
    "ConnectError|ConnectTimeout|Name or service not known|name resolution|No address associated|gaierror|"
    "Network is unreachable|No route to host|Max retries exceeded|telemetry|posthog|amplitude|sens-o-matic|"
    r"pypi\.org|huggingface|new version|update available",
    re.IGNORECASE,
)


class Watched(NamedTuple):
    """What was seen. commands: status, output and complaints of each; connections: of the hook; packets: those that
    were meant for elsewhere, None where no namespace is permitted; logs: of the servers, by name."""

    commands: list[tuple[int, str, str]]
    connections: list[tuple[str, object, list[str]]]
    packets: list[str] | None
    logs: dict[str, str]


@cache
def namespace() -> list[str] | None:
    """The command that closes the network for what follows it; None where that is not permitted here."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return None
    for flags in (["-n"], ["-rn"]):
        command = ["unshare", *flags, "bash", "-c"]
        if subprocess.run([*command, "ip link set lo up"], capture_output=True, check=False).returncode == 0:
            return command
    return None


def watched(folder: Path, code: str, *arguments: str) -> tuple[str, Watched]:
    """Run Python code under watch, closed in if that is permitted; its output, and what was seen."""
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    connections, packets, data = folder / "connections", folder / "packets", folder / "data"
    connections.touch()
    command = [sys.executable, "-c", code, *arguments]
    closed = namespace()
    if closed is not None:
        command = [*closed, CLOSE, "close", sys.executable, PACKETS, str(packets), *command]
    # Neither the user's own settings nor a proxy, which would hide who is meant.
    clean = {
        n: v for n, v in os.environ.items() if not n.startswith(("PREFECT_", "MLFLOW_")) and "proxy" not in n.lower()
    }
    environment = clean | {"PYTHONPATH": str(folder / "hook"), "WATCHED": str(connections), "CALIPERT_DATA": str(data)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = Watched(
        [],
        [tuple(json.loads(line)) for line in connections.read_text().splitlines()],
        packets.read_text().splitlines() if closed else None,
        {path.name: path.read_text() for path in data.glob("logs/*.log")},
    )
    return done.stdout, seen


def outside(connections: list[tuple[str, object, list[str]]]) -> list[tuple[str, object, list[str]]]:
    """Those that are not for this machine: names but localhost, addresses but those of loopback. A path is a socket
    of this machine."""

    def own(host: object) -> bool:
        if host is None or host in ("", "localhost") or (isinstance(host, str) and host.startswith("/")):
            return True
        try:
            return ip_address(str(host)).is_loopback
        except ValueError:
            return False

    return [connection for connection in connections if not own(connection[1])]


@pytest.fixture(scope="module")
def offline(screen: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """The command line's list and a benchmark of the small screen, with servers of their own."""
    import yaml

    folder = tmp_path_factory.mktemp("offline")
    entry = folder / "tiny.yaml"
    entry.write_text(yaml.safe_dump(ENTRY))
    run = ["run", str(entry), "--models", "ridge_coexpression,knn_coexpression", "--source", f"tiny={screen}"]
    output, seen = watched(folder, SESSION, json.dumps([["list"], ["list", "models"], run]))
    return seen._replace(commands=[tuple(one) for one in json.loads(output.splitlines()[-1])])


def test_all_commands_succeed(offline: Watched) -> None:
    for status, output, errors in offline.commands:
        assert status == 0, output[-2000:] + errors[-2000:]
    assert "report.html" in offline.commands[-1][1]


def test_no_python_process_tries_to_reach_beyond_this_machine(offline: Watched) -> None:
    assert outside(offline.connections) == []
    # The hook was there, in both servers too, and saw how the run spoke to them.
    started = [arguments[:2] for event, _, arguments in offline.connections if event == "start"]
    assert [["-m", name] in started for name in ("prefect", "mlflow", "flows.cli.main")] == [True] * 3
    assert ("socket.connect", child_environment.HOST) in {(event, host) for event, host, _ in offline.connections}


def test_no_process_at_all_sends_a_packet_beyond_this_machine(offline: Watched) -> None:
    if offline.packets is None:
        pytest.skip("needs a network namespace of its own (unshare -n, ip), which is not permitted here")
    assert offline.packets == []


def test_nobody_complains(offline: Watched) -> None:
    assert {"prefect.log", "mlflow.log"} <= set(offline.logs)
    texts = offline.logs | {
        f"command {number}": output + errors for number, (_, output, errors) in enumerate(offline.commands)
    }
    complaints = [(name, line) for name, text in texts.items() for line in text.splitlines() if COMPLAINTS.search(line)]
    assert complaints == []


REACHING = """
import socket, subprocess, sys, threading

def reach():
    for target in (("192.0.2.1", 443), ("127.0.0.1", 9)):
        with socket.socket() as one:
            one.settimeout(1)
            try:
                one.connect(target)
            except OSError as error:
                print(error)
    try:
        socket.getaddrinfo("pypi.org.invalid", 443)
    except OSError as error:
        print(error)

if len(sys.argv) == 1:
    reach()
    # A process of its own, and one without the hook.
    subprocess.run([sys.executable, "-c", open("/proc/self/cmdline").read().split(chr(0))[2], "child"], check=True)
    alone = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('198.51.100.7', 123))"
    subprocess.run([sys.executable, "-I", "-S", "-c", alone], check=False)
else:
    thread = threading.Thread(target=reach)
    thread.start()
    thread.join()
"""


def test_the_same_watch_sees_what_does_reach_out(tmp_path: Path) -> None:
    _, seen = watched(tmp_path, REACHING)
    reached = [(event, host) for event, host, _ in outside(seen.connections)]
    # From the process and from its child's thread.
    assert sorted(reached) == [
        *[("socket.connect", "192.0.2.1")] * 2,
        *[("socket.getaddrinfo", "pypi.org.invalid")] * 2,
    ]
    if seen.packets is not None:
        text = "\n".join(seen.packets)
        assert "192.0.2.1 443" in text
        assert "198.51.100.7 123" in text
        assert "127.0.0.1 9" not in text


@pytest.mark.parametrize(
    "line",
    [
        "httpx.ConnectError: [Errno -2] Name or service not known",
        "urllib3: Temporary failure in name resolution",
        "ERROR | prefect.server.services.telemetry - Failed to send telemetry",
        "A new version of the package is available",
    ],
)
def test_complaints_are_known(line: str) -> None:
    assert COMPLAINTS.search(line)


BROWSERS = ("chromium", "google-chrome", "chromium-browser")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


@pytest.mark.parametrize(
    ("server", "path", "shows"),
    [
        ("prefect", "/", "Dashboard"),
        ("prefect", "/runs", "Runs"),
        ("prefect", "/deployments", "Deployments"),
        ("mlflow", "/#/experiments?workflowType=machine_learning", "Experiments"),
    ],
)
def test_a_page_asks_nobody_else_and_is_whole(
    servers: child_environment.Services, tmp_path: Path, server: str, path: str, shows: str
) -> None:
    """As a browser without a network shows it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    log = tmp_path / "log.json"
    options = [
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--log-net-log={log}",
        "--virtual-time-budget=15000",
        "--dump-dom",
    ]
    address = f"{getattr(servers, server)}{path}"
    page = subprocess.run([browser, *FLAGS, *options, address], capture_output=True, text=True, check=True, timeout=120)
    assert f">{shows}<" in re.sub(r"\s+", "", page.stdout)
    told = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # What has an origin, the page has asked for; the rest is the browser's own.
    asked = {one["url"] for one in told if "url" in one and one.get("initiator", "not an origin") != "not an origin"}
    assert len(asked) > 5
    assert {
        url for url in asked if not url.startswith((f"http://{child_environment.HOST}:", "data:", "blob:"))
    } == set()


def test_prefect_tells_its_pages_to_report_nothing(servers: child_environment.Services) -> None:
    told = httpx.get(f"{servers.prefect_api}/admin/settings", timeout=60).raise_for_status().json()["server"]
    assert told["analytics_enabled"] is False
    assert told["ui"]["show_promotional_content"] is False
    assert httpx.get(f"{servers.prefect}/ui-settings", timeout=60).raise_for_status().json()["default_ui"] == "v1"


def test_mlflow_tells_its_pages_to_report_nothing(servers: child_environment.Services) -> None:
    told = httpx.get(f"{servers.mlflow}/ajax-api/3.0/mlflow/ui-telemetry", timeout=60).raise_for_status().json()
    assert told["disable_ui_telemetry"] is True
