"""Vectors of texts from a service that answers as OpenAI's API does (`POST <url>/embeddings`).

Its key goes into the header of the request and nowhere else: answers and errors are shown without it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import httpx
import numpy as np

from blocks.config.secrets import read_secret
from blocks.http import ConnectionLost, is_transient_status, open_client, read_retry_after
from blocks.services.vectors import Vector, build_address, find_fault
from core.catalog.schema import TextService
from core.errors import UserError

TIMEOUT = 120.0  # seconds without a byte, after which a request counts as lost
LONGEST = 200  # letters of the service's words that a message repeats
REFUSED = (401, 403)
RETRY_REMEDY = "run again later: it continues with the texts that are missing"


def read_service_key(service: TextService) -> str:
    """Read the service's key from its Secret block. Raises UserError if there is none, or it cannot be a key."""
    key = read_secret(service.secret)
    if key is None:
        remedy = f"make the Secret block {service.secret} with a key of the service (docs/secrets.md)"
        raise UserError("Prefect blocks", service.secret, f"no such block; {service.url} asks for a key", remedy)
    if not re.fullmatch(r"[!-~]+", key):
        found = "a blank, a line end or a letter that no key has"
        raise UserError("Prefect blocks", service.secret, found, "put the key in as the service shows it, nothing else")
    return key


def request_vectors(service: TextService, dimensions: int | None, texts: Sequence[str]) -> list[Vector]:
    """Request the vectors of texts (float32), in their order.

    dimensions: how long they must be, which the request says; None leaves it to the service. Each text has
    one, which is finite and not all zero.
    Raises ConnectionLost where another try may help, and UserError where the key is missing or refused, the address is
    none, the request is refused, or the answer is not what was asked for.
    """
    key = read_service_key(service)
    where = build_address(service)
    wanted = {"model": service.model, "input": list(texts)} | ({"dimensions": dimensions} if dimensions else {})
    try:
        with open_client(headers={"Authorization": f"Bearer {key}"}, timeout=TIMEOUT) as client:
            answer = client.post(where, json=wanted)
    except httpx.RequestError as error:
        found = f"{type(error).__name__}: {_hide_key(key, str(error))}"
        # Not from the error: it holds the request, and with it the key.
        raise ConnectionLost(service.url, "connection", found, RETRY_REMEDY) from None
    except (httpx.InvalidURL, UnicodeError) as error:  # such as a wrong port, or a name that no host can have
        found = f"no address that can be asked ({_hide_key(key, str(error))})"
        raise UserError(where, "service.url", found, "correct `url` of the entry (docs/catalog.md)") from None
    if not answer.is_success:
        raise _explain_refusal(service, where, answer, _hide_key(key, _read_words(answer)))
    return _parse_vectors(answer, len(texts), dimensions, where)


def _explain_refusal(service: TextService, where: str, answer: httpx.Response, words: str) -> Exception:
    """Return what an answer other than success means. words: the service's own, without the key."""
    status = answer.status_code
    said = f"HTTP {status} {httpx.codes.get_reason_phrase(status)}".strip()
    if status in REFUSED:
        # The service's words may repeat a part of the key.
        remedy = f"put a valid key into the Secret block {service.secret} (docs/secrets.md), and run again"
        return UserError(where, "key", said, remedy)
    said += f": {words}" if words else ""
    if status == httpx.codes.TOO_MANY_REQUESTS and "insufficient_quota" in answer.text:
        remedy = "raise the account's limit at the service, and run again: what was answered is kept"
        return UserError(where, "quota", said, remedy)
    # Services of this kind answer 409 while something else changes, which passes too.
    if is_transient_status(status) or status == httpx.codes.CONFLICT:
        busy = ConnectionLost(service.url, "connection", said, RETRY_REMEDY)
        busy.wait = read_retry_after(answer)
        return busy
    return UserError(where, "request", said, "check `service` and `dimensions` of the entry (docs/catalog.md)")


def _read_words(answer: httpx.Response) -> str:
    """Return the service's explanation, if it gives one in its form, else nothing."""
    try:
        words = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return words if isinstance(words, str) else ""


def _hide_key(key: str, words: str) -> str:
    return words.replace(key, "...")[:LONGEST]


def _parse_vectors(answer: httpx.Response, n: int, dimensions: int | None, where: str) -> list[Vector]:
    try:
        data = answer.json()["data"]
        rows = {row["index"]: np.asarray(row["embedding"], dtype=np.float32) for row in data}
        in_order = [rows[place] for place in range(n)]
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        data, in_order = [], []
    if len(data) != n:
        raise _reject_answer(where, f"not one vector for each of the {n} texts")
    for vector in in_order:
        # Of one answer, all are equally long.
        why = find_fault(vector, dimensions or in_order[0].size)
        if why:
            raise _reject_answer(where, f"a vector with {why}")
    return in_order


def _reject_answer(where: str, found: str) -> UserError:
    remedy = "run again: good answers are kept. If it happens again, check `service` and `dimensions` of the entry"
    return UserError(where, "answer", found, remedy)
