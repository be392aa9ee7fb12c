"""Export a model with its adapter to ONNX."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import nn

from onelora_compile.adapter import unwrap, vectors
from onelora_compile.errors import ConfigError, ExportError, OneLoRAError, require
from onelora_compile.exporters.freeze import freeze
from onelora_compile.exporters.save_onnx import save_model
from onelora_compile.exporters.verify import Parity, check_onnx
from onelora_compile.merge import FoldLoss
from onelora_compile.progress import steps
from onelora_compile.text import Printable, bytes_text
from onelora_compile.version import __version__

if TYPE_CHECKING:
    import onnx_ir
    from torch.export import ExportedProgram

    from onelora_compile.passes.fold_vectors import FoldResult

ADAPTERS = ("fold",)


@dataclasses.dataclass(frozen=True)
class ExportReport(Printable):
    """What an export wrote and how good it is.

    Attributes:
        files: the model file, and the file of its weights where it needs one.
        bytes: of all files together.
        opset_version: of the standard ONNX operators.
        losses: what rounding lost in each folded weight, by module name.
        unused: modules whose vector the graph does not use.
        parity: the difference to eager on the example inputs; None without verification.
        seconds: wall time.
    """

    files: list[Path]
    bytes: int
    opset_version: int
    losses: dict[str, FoldLoss]
    unused: list[str]
    parity: Parity | None
    seconds: float

    @property
    def error(self) -> float | None:
        """The largest relative difference to eager, None without verification."""
        return None if self.parity is None else self.parity.relative

    def __rich__(self) -> Table:
        table = Table(title=f"exported {self.files[0]}", show_header=False)
        table.add_row("files", "\n".join(str(file) for file in self.files))
        table.add_row("size", bytes_text(self.bytes))
        table.add_row("opset", str(self.opset_version))
        worst = max((loss.relative for loss in self.losses.values()), default=0.0)
        table.add_row("vectors folded", f"{len(self.losses)} (lost to rounding: at most {worst:.1e} of the update)")
        if self.unused:
            table.add_row("not in the graph", ", ".join(self.unused))
        if self.parity is None:
            table.add_row("verified", "no")
        else:
            table.add_row("verified", f"ONNX Runtime against eager: {self.parity.relative:.1e} relative, passed")
        table.add_row("time", f"{self.seconds:.1f} s")
        return table


def export_onnx(
    model: nn.Module,
    args: Sequence[Any],
    path: str | os.PathLike[str],
    kwargs: Mapping[str, Any] | None = None,
    adapters: str = "fold",
    dynamic_shapes: Any = None,
    opset_version: int | None = None,
    verify: bool = True,
    external_data: bool | None = None,
    progress: bool = True,
) -> ExportReport:
    """Export a model, adapted or not, to an ONNX file, and check that file in ONNX Runtime.

    The model is exported in evaluation mode and is not changed, also when it is compiled.

    Args:
        model: the model.
        args: example inputs, in the dtypes and on the device of the model.
        path: the file to write; replaced in one step if it exists.
        kwargs: example keyword inputs.
        adapters: `"fold"`: the vectors are inside the weights, and the graph is that of the base.
        dynamic_shapes: as in `torch.export.export`; a dimension may be a name: `{"x": {0: "batch"}}`.
        opset_version: None is the exporter's recommended one.
        verify: run the file on the example inputs, compare with eager, and fail beyond the dtype's tolerance.
        external_data: keep the weights in `<path>.data`; None does so from 1.9 GB on.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        ExportError: the model can't be exported, or the file differs from the model; no file is left then, and an
            old one is as it was.
        ConfigError: an unknown value of `adapters`.
        MissingExtraError: an ONNX package is not installed.
        OSError: the file can't be written.
    """
    if adapters not in ADAPTERS:
        raise ConfigError(f"adapters={adapters!r} is not one of {', '.join(map(repr, ADAPTERS))}")
    args = args if isinstance(args, (tuple, list)) else (args,)
    require("onnxscript", "onnx", "export to ONNX")
    if verify:
        require("onnxruntime", "onnx", "verify the export (or pass verify=False)")
    root, path, start = unwrap(model), Path(path), time.perf_counter()
    with steps(f"export {path.name}", 3, progress) as step:
        step("capture and fold")
        program, folded = _captured(root, args, kwargs, dynamic_shapes)
        step("convert to ONNX")
        ir_model = _converted(program, opset_version, dynamic_shapes)
        ir_model.metadata_props.update(_provenance(root, adapters))
        step("write and verify" if verify else "write")
        # Verified before it gets its name: a file that is there is a file that passed.
        parity: list[Parity] = []
        files = save_model(
            ir_model,
            path,
            external_data,
            check=lambda written: parity.append(_checked(written, root, args, kwargs)) if verify else None,
        )
    return ExportReport(
        files=files,
        bytes=sum(file.stat().st_size for file in files),
        opset_version=ir_model.opset_imports[""],
        losses=folded.losses,
        unused=folded.unused,
        parity=parity[0] if parity else None,
        seconds=time.perf_counter() - start,
    )


def _captured(
    root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> tuple[ExportedProgram, FoldResult]:
    try:
        return freeze(root, args, kwargs, dynamic_shapes)
    except OneLoRAError:
        raise
    except Exception as error:  # torch.export raises what it likes, also the model's own exceptions
        raise ExportError(f"torch.export can't capture {type(root).__name__}: {error}") from error


def _converted(program: ExportedProgram, opset_version: int | None, dynamic_shapes: Any) -> onnx_ir.Model:
    with _quiet():
        try:
            converted = torch.onnx.export(
                program,
                opset_version=opset_version,
                dynamic_shapes=dynamic_shapes,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(f"torch.onnx can't convert the captured program: {error}") from error
    assert converted is not None
    return converted.model


def _checked(file: Path, root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Parity:
    parity = check_onnx(file, root, args, kwargs)
    if not parity.passed:
        raise ExportError(
            f"the exported model differs from {type(root).__name__}: output {parity.output!r} by {parity.relative:.1e} "
            f"relative ({parity.absolute:.1e} absolute), {parity.tolerance:.0e} is allowed; nothing was written"
        )
    return parity


def _provenance(root: nn.Module, adapters: str) -> dict[str, str]:
    """What `onelora inspect` shows of the file."""
    held = vectors(root)
    digest = hashlib.sha256()
    for name, vector in sorted(held.items()):
        digest.update(name.encode() + vector.detach().float().cpu().contiguous().numpy().tobytes())
    return {
        "onelora.mode": adapters if held else "base",
        "onelora.vectors": json.dumps({name: vector.numel() for name, vector in held.items()}),
        "onelora.adapter_sha256": digest.hexdigest() if held else "",
        "onelora.producer": f"onelora-compile {__version__}, torch {torch.__version__}",
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own chatter: what matters of it comes back as an error or in the report."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
