"""End the models of a flow together with it, although they run in threads that no signal reaches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock

LOG = logging.getLogger("calipert.cancellation")


class Stopped(Exception):
    """Something was ended, or not started, because its flow ended or was cancelled. what: it; reason: in words."""

    def __init__(self, what: str, reason: str) -> None:
        self.what = what
        self.reason = reason
        # Both go to Exception, so that the error survives pickling between processes.
        super().__init__(what, reason)

    def __str__(self) -> str:
        """Say what was stopped, and why."""
        return f"{self.what} was stopped: {self.reason}"


class _Scope:
    """What ends together. A scope that was stopped stays so; one that begins later is free of what was before."""

    def __init__(self, outer: _Scope | None) -> None:
        self.outer = outer
        self.own_reason: str | None = None
        self.earlier_stops = len(_STOPS)

    def reason(self) -> str | None:
        """Why this scope was stopped, or None."""
        if len(_STOPS) > self.earlier_stops:
            return _STOPS[self.earlier_stops]
        return self.own_reason or (self.outer.reason() if self.outer else None)


# The reasons of all calls of `stop_all` in this process.
_STOPS: list[str] = []
# What runs outside of every flow.
_PROCESS = _Scope(None)
# Prefect runs the tasks of a flow in copies of its context: each thread knows to which flow it belongs, and still does
# when it gets around to starting a model after the flow has ended.
_SCOPE: ContextVar[_Scope] = ContextVar("scope", default=_PROCESS)
_RUNNING: dict[object, tuple[_Scope, Callable[[], None]]] = {}
# Re-entrant: a signal's handler may stop all while its own thread holds the lock.
_LOCK = RLock()


@contextmanager
def end_models_with(what: str) -> Iterator[None]:
    """Whatever the block starts, in this thread or in threads that run in copies of its context, ends with its error.

    what: the flow, in words. When the block is left by an exception, a cancellation included, its running models are
    killed, and a caller that waits for them or starts another in its name gets `Stopped`, however late. Blocks may be
    nested: the inner ends with the outer. A block that comes after is not touched.
    """
    current = _SCOPE.get()
    scope = _Scope(None if current is _PROCESS else current)
    token = _SCOPE.set(scope)
    try:
        yield
    except BaseException as error:
        scope.own_reason = f"{what} ended with {type(error).__name__}"
        _kill(lambda running: running.reason() is not None)
        raise
    finally:
        _SCOPE.reset(token)


def stop_all(reason: str) -> None:
    """Kill all models that this process runs, in any thread; may be called by a signal's handler.

    A caller that waits for one of them or for a GPU, or starts another, gets `Stopped` with the reason. Only a new
    block of `end_models_with`, outside of the stopped ones, may run models again.
    """
    _STOPS.append(reason)
    _kill(lambda running: True)


def raise_if_stopped(what: str) -> None:
    """Raise Stopped if what the caller belongs to was stopped. what: for the error, `ridge train`."""
    reason = _SCOPE.get().reason()
    if reason is not None:
        raise Stopped(what, reason)


@contextmanager
def kill_on_stop(what: str, kill: Callable[[], None]) -> Iterator[None]:
    """While the block runs, a stop calls `kill`, once and from the thread that stops. Raises Stopped after a stop.

    The error comes before the block if the stop came before it, and instead of its natural end or its own error
    otherwise: a model that was killed has not failed.
    """
    entry = object()
    with _LOCK:
        _RUNNING[entry] = (_SCOPE.get(), kill)
    try:
        # Only now: a stop between an earlier look and the entry would miss this one.
        raise_if_stopped(what)
        try:
            yield
        except Exception:
            raise_if_stopped(what)
            raise
    finally:
        with _LOCK:
            del _RUNNING[entry]
    raise_if_stopped(what)


def _kill(chosen: Callable[[_Scope], bool]) -> None:
    # Held to the end: no process of these can be replaced by a stranger with its id meanwhile.
    with _LOCK:
        kills = [kill for scope, kill in _RUNNING.values() if chosen(scope)]
        for kill in kills:
            kill()
    if kills:
        LOG.warning("models that still ran were killed: %d", len(kills))
