"""The routes: predictions, the list of adapters, one more adapter. Errors are `{"error": "one message"}`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from onelora_compile.errors import BaseMismatchError, OneLoRAError, StateError
from onelora_compile.examples.serving.backends import Backend
from onelora_compile.examples.serving.batcher import Batcher, BusyError
from onelora_compile.examples.serving.fields import read_inputs

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # also names a file


def make_app(
    backend: Backend,
    folder: str | os.PathLike[str] | None = None,
    max_batch: int = 32,
    max_queue: int = 256,
    max_bytes: int = 64 << 20,
) -> Starlette:
    """An ASGI application.

    Args:
        backend: what computes.
        folder: where uploaded adapters are kept, as `<name>.safetensors`; those in it are loaded now. None keeps them
            until the server ends.
        max_batch: as in `Batcher`, and so is `max_queue`.
        max_queue: beyond it a request is answered with 503.
        max_bytes: of a request.

    Returns:
        The application; `app.state.batcher` counts batches.
    """
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for file in sorted(Path(folder).glob("*.safetensors")):
            if file.stem not in backend.adapters():
                backend.add(file, file.stem)
    batcher = Batcher(backend, max_batch, max_queue)
    server = _Server(backend, folder, batcher, max_bytes)
    app = Starlette(
        routes=[
            Route("/predict", server.predict, methods=["POST"]),
            Route("/adapters", server.adapters, methods=["GET"]),
            Route("/adapters", server.add, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refused, OneLoRAError: _refused, BusyError: _refused, Exception: _refused},
        lifespan=server.lifespan,
    )
    app.state.batcher = batcher
    return app


class _Server:
    def __init__(
        self, backend: Backend, folder: str | os.PathLike[str] | None, batcher: Batcher, max_bytes: int
    ) -> None:
        self._backend, self._folder, self._batcher, self._max_bytes = backend, folder, batcher, max_bytes
        self._adding = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with self._batcher.runs():
            yield

    async def predict(self, request: Request) -> Response:
        """{"adapter": name or null, "inputs": …} -> {"outputs": {name: nested lists}}, of one example."""
        asked = _parsed(await self._body(request))
        name = asked.get("adapter")
        if name is not None and name not in self._backend.adapters():
            raise HTTPException(404, f"there is no adapter {name!r}; GET /adapters lists them")
        inputs = read_inputs(self._backend.fields, asked["inputs"])
        outputs = await self._batcher.predict(name, inputs)
        if bad := [key for key, value in outputs.items() if not np.isfinite(value).all()]:
            raise HTTPException(500, f"the model returned NaN or infinity in {bad}")
        return JSONResponse({"outputs": {key: value.tolist() for key, value in outputs.items()}})

    async def adapters(self, request: Request) -> Response:
        """The names that requests may have."""
        return JSONResponse({"adapters": self._backend.adapters()})

    async def add(self, request: Request) -> Response:
        """The body is an adapter file; ?name= is what it is called from now on."""
        name = request.query_params.get("name", "")
        if not _NAME.fullmatch(name) or name.endswith(".safetensors"):
            raise HTTPException(422, f"?name={name}: 1 to 100 letters, digits, '.', '_', '-', without .safetensors")
        content = await self._body(request)
        async with self._adding:
            await asyncio.to_thread(self._added, name, content)
        return JSONResponse({"adapter": name}, 201)

    def _added(self, name: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".upload-") as beside:
            file = Path(beside) / f"{name}.safetensors"
            file.write_bytes(content)
            try:
                self._backend.add(file, name)
            except OneLoRAError as error:
                raise type(error)(str(error).replace(str(file), "the upload")) from error
            if self._folder is not None:
                file.replace(Path(self._folder) / file.name)

    async def _body(self, request: Request) -> bytes:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > self._max_bytes:
                raise HTTPException(413, f"a request may have {self._max_bytes} bytes")
        return bytes(content)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the request is no JSON: {error}") from None
    if not isinstance(asked, dict) or "inputs" not in asked or set(asked) - {"adapter", "inputs"}:
        raise HTTPException(422, 'a request is {"adapter": name or null, "inputs": …}')
    if not isinstance(asked.get("adapter"), (str, type(None))):
        raise HTTPException(422, "adapter is a name, or null for the base")
    return asked


async def _refused(request: Request, error: Exception) -> Response:
    """One message for every error; what is not the client's fault is in the log of the server."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    if isinstance(error, BusyError):
        return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})
    if isinstance(error, (BaseMismatchError, StateError)):
        return JSONResponse({"error": str(error)}, 409)
    if isinstance(error, OneLoRAError) and isinstance(error, ValueError):
        return JSONResponse({"error": str(error)}, 422)
    return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)
