"""How `calipert status` shows what it found."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from blocks.config.paths import store_folder
from blocks.config.settings import read_places
from blocks.services.stack import ServiceStatus
from core.errors import shown
from flows.cli.console import start_table
from flows.cli.status import ACTIVE, DAYS, FAILED, PAGE, WAITING, FlowRun, Pool, Snapshot

COLOURS = {"COMPLETED": "green", "FAILED": "red", "CRASHED": "red", "CANCELLED": "yellow", "RUNNING": "cyan"}
# Rows of each kind of flow run, so that all fit on one screen.
MOST = {"active": 5, "waiting": 3, "failed": 5, "done": 4}
PLAIN: dict[str, Any] = {"box": None, "padding": (0, 2, 0, 0), "header_style": "dim"}
NAMES = {"active": "running", "waiting": "scheduled", "failed": "failed", "done": "completed"}


def make_screen(found: Snapshot, now: datetime) -> RenderableType:
    """Lay out what `calipert status` prints. now: in UTC."""
    parts: list[RenderableType] = [_services(found.services)]
    stopped = [one.name for one in found.services if one.state == "stopped" and one.name in ("prefect", "mlflow")]
    if stopped:
        parts.append(Text("`make up` starts servers and workers; `calipert run` starts the servers.", style="yellow"))
    if found.pools:
        parts += ["", _pools(found.pools)]
    if any(found.runs.values()):
        parts += ["", _runs(found.runs, now)]
    elif found.runs:
        parts += ["", Text(f"No flow run in the last {DAYS} days.", style="dim")]
    parts += ["", _resources(found)]
    parts += [Text(trouble, style="red") for trouble in found.troubles]
    return Group(*parts)


def _services(services: Iterable[ServiceStatus]) -> Table:
    table = start_table("service", "state", "address or log", whole=2, **PLAIN)
    colours = {"running": "green", "stopped": "yellow", "not answering": "red"}
    for one in services:
        place = one.url or ("" if one.state == "stopped" else str(one.log))
        table.add_row(one.name, Text(one.state, style=colours[one.state]), place)
    return table


def _pools(pools: Iterable[Pool]) -> Table:
    table = start_table("work pool", "workers online", whole=1, **PLAIN)
    for pool in pools:
        online = ", ".join(pool.online) or "none: what is sent here waits"
        more = f" ({pool.offline} offline)" if pool.offline else ""
        paused = "paused; " if pool.paused else ""
        table.add_row(pool.name, Text(f"{paused}{online}{more}", style="" if pool.online else "yellow"))
    return table


def _runs(runs: dict[str, list[FlowRun]], now: datetime) -> Group:
    """Lay out a line for each flow run, and below it what it does, or why it failed, over the whole width."""
    shown = [run for kind, most in MOST.items() for run in runs.get(kind, [])[:most]]
    names = max(len(run.name) for run in shown)
    states = max(len(run.state) for run in shown)
    lines: list[RenderableType] = [Text(f"{'flow run':{names}}  {'state':{states}}  when", style="dim")]
    for kind, most in MOST.items():
        of_kind = runs.get(kind, [])
        for run in of_kind[:most]:
            state = (run.state.lower().ljust(states), COLOURS.get(run.kind, ""))
            lines.append(Text.assemble(run.name.ljust(names), "  ", state, "  ", _describe_time(run, now)))
            # `prefect flow-run cancel` and `logs` take the id.
            own_id = "" if run.kind == "COMPLETED" else run.id
            if what := " · ".join(filter(None, [own_id, ", ".join(run.models), _describe_work(run)])):
                lines.append(Padding(Text(what), (0, 0, 0, 2)))
        if len(of_kind) > most:
            count = f"{len(of_kind) - most}{'+' if len(of_kind) == PAGE else ''}"
            lines.append(Text(f"  and {count} more {NAMES[kind]}", style="dim"))
    return Group(*lines)


def _describe_time(run: FlowRun, now: datetime) -> str:
    if run.kind in WAITING:
        return f"due {_format_time(run.due, now)}" if run.due else ""
    if run.kind in ACTIVE:
        lasts = _format_duration((now - run.begun).total_seconds()) if run.begun else ""
        return f"since {_format_time(run.begun, now)}, {lasts}" if run.begun else ""
    lasted = f", {_format_duration(run.seconds)}" if run.seconds else ""
    return f"{_format_time(run.ended or run.due, now)}{lasted}"


def _describe_work(run: FlowRun) -> str:
    if run.kind in FAILED:
        return run.reason or "no reason was given"
    if run.kind not in ACTIVE:
        return ""
    parts = []
    if run.folds:
        done, failed, whole = run.folds
        parts.append(f"{done} of {whole} folds done" + (f", {failed} failed" if failed else ""))
    if run.doing:
        names = list(dict.fromkeys(run.doing))
        parts.append("; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""))
    return "; ".join(parts)


def _resources(found: Snapshot) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for gpu, holder in found.gpus:
        table.add_row(f"GPU {gpu}", Text(holder))
    if not found.gpus:
        table.add_row("GPUs", "none: models train on the CPU")
    count, size, free = found.store
    shared = read_places().store
    also = f"; shared in {shared}" if shared else ""
    table.add_row(
        "store", f"{count:,} artifacts, {_format_size(size)}; {_format_size(free)} free in {store_folder()}{also}"
    )
    if found.stale:
        text = (
            f"running, but their flow run or process has ended: {shown(found.stale, 5)}. "
            "The next flow run on their data set ends them."
        )
        table.add_row("MLflow", Text(text, style="yellow"))
    return table


def _format_time(time: datetime | None, now: datetime) -> str:
    """Format local time, with the day unless it is today."""
    if time is None:
        return ""
    local, today = time.astimezone(), now.astimezone()
    return local.strftime("%H:%M" if local.date() == today.date() else "%b %d %H:%M")


def _format_duration(seconds: float) -> str:
    """Format a duration: `45 s`, `12 min`, `3 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _format_size(size: float) -> str:
    """Format a size: `12 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
