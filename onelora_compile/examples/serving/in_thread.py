"""A server beside other code, in a thread of this process: for tests, measurements and notebooks."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from onelora_compile.errors import StateError


@contextlib.contextmanager
def serving(app: Starlette, port: int = 0) -> Iterator[int]:
    """Inside, the application is served on the loopback; its requests are finished at the end.

    Args:
        app: of `make_app`.
        port: 0 takes a free one.

    Yields:
        The port.
    """
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise StateError(f"the server did not start on port {port}: its log says why")
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
