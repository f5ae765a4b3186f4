"""Passwords and keys, from Prefect's Secret blocks. docs/secrets.md lists them and says how to make one.

A value goes from here into the client that needs it and nowhere else: never into a parameter, a log, an error, an
artifact or MLflow.
"""

from __future__ import annotations

import os
import re
from functools import cache
from urllib.parse import urlsplit

from core.errors import UserError

S3_KEY = "calipert-s3-key"
S3_SECRET = "calipert-s3-secret"  # noqa: S105 - the name of a block
# The variables that MLflow's client reads, and the blocks that replace them.
MLFLOW = {
    "MLFLOW_TRACKING_USERNAME": "calipert-mlflow-username",
    "MLFLOW_TRACKING_PASSWORD": "calipert-mlflow-password",
}

_NAME = re.compile(r"[a-z0-9-]+")


def read_secret(name: str) -> str | None:
    """Read the Secret block of that name (a-z, 0-9, dash); None if there is none, or no Prefect API is set.

    It is read once in a process: a block that is made later counts for the next process. Never starts a server.
    Callable from any thread, and inside an event loop, which it blocks meanwhile. Raises UserError if the API is out of
    reach or refuses, and if the block is of another type or holds no text.
    """
    return _values((name,))[0]


def read_s3_credentials() -> dict[str, str]:
    """Read {"key", "secret"} for s3fs from the blocks S3_KEY and S3_SECRET; {} if there is neither.

    Without them s3fs uses the AWS chain (environment, files, the role of the machine). Raises UserError for one block
    without the other.
    """
    return _pair({"key": S3_KEY, "secret": S3_SECRET})


def read_mlflow_credentials() -> dict[str, str]:
    """Read what MLflow's client must find in the environment from the blocks of MLFLOW.

    {} if there are none, or if one of the variables is already set. Raises UserError for one block without the other.
    """
    if any(name in os.environ for name in MLFLOW):
        return {}
    return _pair(MLFLOW)


def _pair(blocks: dict[str, str]) -> dict[str, str]:
    values = dict(zip(blocks, _values(tuple(blocks.values())), strict=True))
    found = {name: value for name, value in values.items() if value is not None}
    if found and len(found) < len(blocks):
        (absent,) = (block for name, block in blocks.items() if name not in found)
        (present,) = (blocks[name] for name in found)
        remedy = f"make the Secret block {absent} too, or delete {present}"
        raise UserError("Prefect blocks", absent, f"{present} without it", remedy)
    return found


def _values(names: tuple[str, ...]) -> tuple[str | None, ...]:
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"no name of a block: {name!r} (a-z, 0-9 and dashes only)")
    from prefect.settings import get_current_settings

    api = get_current_settings().api.url
    # Without an address Prefect's client would start a server of its own, which has no blocks.
    return (None,) * len(names) if api is None else _read(api, names)


@cache
def _read(api: str, names: tuple[str, ...]) -> tuple[str | None, ...]:
    """Read Secret blocks by one request to the API. api: its address, a part of the cache's key."""
    import httpx
    from prefect.client.orchestration import get_client

    host = urlsplit(api)
    if host.username or host.password:
        found = f"a user name or password for {host.hostname}"
        raise UserError("environment", "PREFECT_API_URL", found, "take it out and set PREFECT_API_AUTH_STRING instead")
    wanted = {"block_documents": {"name": {"any_": names}}, "include_secrets": True}
    try:
        # The synchronous client: `Secret.load` would return a coroutine where an event loop runs.
        with get_client(sync_client=True) as client:
            documents = client.request("POST", "/block_documents/filter", json=wanted).json()
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        remedy = "check PREFECT_API_URL, and the server's log"
        if status in (401, 403):
            remedy = "set PREFECT_API_AUTH_STRING as the server wants it"
        raise UserError(api, "Prefect API", f"HTTP {status} to the question for Secret blocks", remedy) from error
    except httpx.TransportError as error:
        remedy = "start the Prefect server (`make up` does), or correct PREFECT_API_URL"
        raise UserError(api, "Prefect API", f"no answer ({type(error).__name__}: {error})", remedy) from error
    return tuple(_value(name, [document for document in documents if document["name"] == name]) for name in names)


def _value(name: str, documents: list[dict[str, object]]) -> str | None:
    """Return the text of the Secret block among the blocks of this name, of which there may be one of each type."""
    # Not by `Secret.get`, which makes a number of a password of digits.
    types = {str(document["block_type_name"]): document["data"] for document in documents}
    if not types:
        return None
    if "Secret" not in types:
        found = f"a block of the type {', '.join(sorted(types))}"
        raise UserError("Prefect blocks", name, found, "make a block of the type Secret under this name")
    data = types["Secret"]
    value = data.get("value") if isinstance(data, dict) else None
    if not isinstance(value, str) or not value:
        remedy = "put the value in as text: in Python, Secret(value=...) with a str"
        raise UserError("Prefect blocks", name, "a Secret without text", remedy)
    return value
