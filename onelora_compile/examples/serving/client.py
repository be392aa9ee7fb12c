"""Requests to the server over one connection that stays open; the standard library is enough."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


class RefusedError(Exception):
    """The server's answer is an error.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Client:
    """One connection; each thread takes its own.

    Args:
        port: of the server.
        host: of the server.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=120)

    def predict(self, adapter: str | None, inputs: Any) -> dict[str, np.ndarray]:
        """Outputs of one example by name; None is the base.

        Raises:
            RefusedError: the server's error.
        """
        given = {key: one.tolist() for key, one in inputs.items()} if isinstance(inputs, dict) else inputs.tolist()
        answer = self._ask("POST", "/predict", json.dumps({"adapter": adapter, "inputs": given}).encode())
        return {name: np.asarray(value) for name, value in answer["outputs"].items()}

    def adapters(self) -> list[str]:
        """The adapters of the server."""
        return list(self._ask("GET", "/adapters")["adapters"])

    def add(self, path: Path, name: str) -> None:
        """Upload an adapter file.

        Raises:
            RefusedError: the server's error.
        """
        self._ask("POST", f"/adapters?name={name}", Path(path).read_bytes())

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _ask(self, method: str, target: str, body: bytes | None = None) -> Any:
        self._connection.request(method, target, body)
        answer = self._connection.getresponse()
        content = json.loads(answer.read())
        if answer.status >= 400:
            raise RefusedError(answer.status, content["error"])
        return content


@contextlib.contextmanager
def connected(port: int) -> Iterator[Client]:
    """A client that is closed at the end."""
    client = Client(port)
    try:
        yield client
    finally:
        client.close()
