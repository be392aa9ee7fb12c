"""Serve many adapters of one base.

python -m onelora_compile.examples.serving bank.onnx --adapters folder
python -m onelora_compile.examples.serving mymodels:make --adapters folder

mymodels:make is a function of yours that returns (model, example inputs by name); the model is compiled.
"""

from __future__ import annotations

import argparse
import importlib

from onelora_compile.errors import ConfigError, OneLoRAError, require
from onelora_compile.examples.serving.backends import Backend, CompiledRows, OnnxBank


def main() -> None:
    """Start the server; it ends after the requests that it has, on SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an ONNX bank, or module:function")
    parser.add_argument("--adapters", metavar="FOLDER", help="adapter files that are served too; uploads are kept here")
    parser.add_argument("--room", type=int, default=1000, help="of a bank: how many adapters can be added")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--max-queue", type=int, default=256)
    arguments = parser.parse_args()
    try:
        uvicorn = require("uvicorn", "serve", "serve adapters")
        require("starlette", "serve", "serve adapters")
        from onelora_compile.examples.serving.app import make_app

        backend = backend_of(arguments.model, arguments.room)
        app = make_app(backend, arguments.adapters, arguments.max_batch, arguments.max_queue)
    except (OneLoRAError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    uvicorn.run(app, host=arguments.host, port=arguments.port, ws="none", timeout_graceful_shutdown=30)


def backend_of(model: str, room: int) -> Backend:
    """The back end of an argument.

    Raises:
        ConfigError: neither an ONNX file nor module:function.
    """
    if model.endswith(".onnx"):
        return OnnxBank(model, room)
    module, _, name = model.partition(":")
    if not name:
        raise ConfigError(f"{model!r} is neither a file *.onnx nor module:function")
    return CompiledRows(*getattr(importlib.import_module(module), name)())


if __name__ == "__main__":
    main()
