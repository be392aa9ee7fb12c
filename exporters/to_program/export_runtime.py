"""Export a model with its adapter to the file of a runtime that reads programs of torch.export."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from onelora_compile.errors import ConfigError, ExportError, OneLoRAError, one_of
from onelora_compile.exporters.calls.compare import Parity
from onelora_compile.exporters.calls.quiet import quiet
from onelora_compile.exporters.jetson.device.core.modes import BASE
from onelora_compile.exporters.to_program.capture import NO_BOUND
from onelora_compile.exporters.to_program.export import PROGRAM_MODES, Exported, program_of
from onelora_compile.exporters.to_program.report import ExportReport
from onelora_compile.exporters.to_program.runtimes import RUNTIMES, Runtime
from onelora_compile.file_names import as_file
from onelora_compile.looking.process_flags import no_autocast
from onelora_compile.progress import steps
from onelora_compile.weights.atomic_write import TEMPORARY, check_writable, replacing_all
from onelora_compile.weights.file_kinds import refuse_other_kinds


def export_runtime(
    model: nn.Module,
    args: Sequence[Any] | Tensor,
    path: str | os.PathLike[str],
    kwargs: Mapping[str, Any] | None = None,
    runtime: str = "pt2",
    adapters: str = "fold",
    dynamic_shapes: Any = None,
    verify: bool = True,
    progress: bool = True,
) -> ExportReport:
    """Export a model, adapted or not, to a runtime's file, and check that file in the runtime.

    The file holds what `export_program` returns; how it is called is said there. A runtime whose inputs are a list
    takes them in that order.

    Args:
        model: the model; it is not changed.
        args: example inputs, in the dtypes and on the device of the model.
        path: the file to write, which ends as the runtime's files do; replaced in one step if it exists.
        kwargs: example keyword inputs.
        runtime: whose file it is.
            "pt2": `torch.export.load`.
            "aoti": AOTInductor's package, compiled for the device that the model is on; needs a C++ compiler.
            "executorch": a `.pte` with XNNPACK's delegate; needs the package `executorch`. Memory is planned ahead, so
            a dynamic axis needs its largest size: `torch.export.Dim("batch", max=8)`.
            "openvino": `.xml`, and the weights in a `.bin` beside it; needs the package `openvino`.
        adapters: as in `export_program`: "fold" or "input".
        dynamic_shapes: as in `export_program`.
        verify: run the file on the example inputs, on the CPU but for "pt2" and "aoti", compare with eager, and fail
            beyond the dtype's tolerance; with "input" once more with other vectors.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        ExportError: the model can't be exported so, or the file differs from it; no file is left then, and an old one
            is as it was.
        ConfigError: an unknown runtime or value of `adapters`, a name that ends otherwise, a file of another kind.
        StateError, PassError, MergeError: as `export_program`.
        MissingExtraError: the runtime is not installed.
        OSError: the file can't be written.
    """
    one_of("runtime", runtime, RUNTIMES)
    one_of("adapters", adapters, PROGRAM_MODES)
    chosen, path, start = RUNTIMES[runtime], as_file(path, "path"), time.perf_counter()
    files = _files(path, chosen)
    for file in files:
        check_writable(file)
    chosen.needed()
    with steps(f"export {path.name}", 3, progress) as step:
        step("capture")
        exported = program_of(model, args, kwargs, adapters, dynamic_shapes)
        if chosen.bounded and any(span.upper >= NO_BOUND for span in exported.program.range_constraints.values()):
            raise ExportError(
                f"{chosen.title} plans memory for the largest sizes, and an axis in dynamic_shapes has none: give "
                'torch.export.Dim("batch", max=8) in the place of a name, or leave it out'
            )
        step(f"write for {chosen.title}")
        with (
            replacing_all(files) as besides,
            quiet(),
            tempfile.TemporaryDirectory(dir=path.parent, prefix=TEMPORARY) as folder,
        ):
            # Runtimes want names with their endings, and find one file by the name of another.
            written = [Path(folder) / f"model{ending}" for ending in chosen.endings]
            _write(exported, chosen, written[0])
            step("verify" if verify else "name")
            # Verified before it gets its name: a file that is there is a file that passed.
            parity = _checked(exported, chosen, written[0]) if verify else None
            for one, beside in zip(written, besides, strict=True):
                os.replace(one, beside)
    return ExportReport(
        files=files,
        bytes=sum(file.stat().st_size for file in files),
        runtime=chosen.title,
        opset_version=None,
        mode=adapters if exported.source.values else BASE.name,
        vectors=len(exported.inputs or exported.folded.losses),
        losses=exported.folded.losses,
        unused=exported.folded.unused,
        captured_for=exported.captured_for,
        parity=parity,
        seconds=time.perf_counter() - start,
    )


def _files(path: Path, runtime: Runtime) -> list[Path]:
    """The names of the files.

    Raises:
        ConfigError: one ends otherwise, or is that of another kind of file.
    """
    first, *others = runtime.endings
    if path.suffix != first:
        raise ConfigError(f"path={str(path)!r}: a file for {runtime.title} ends in {first}, for example model{first}")
    refuse_other_kinds(path, first, "path")
    files = [path, *(path.with_suffix(ending) for ending in others)]
    for file in files[1:]:
        if file.exists() and not path.exists():
            raise ConfigError(f"{file} is there without {path}, so it is no part of such a model: give another name")
    return files


def _write(exported: Exported, runtime: Runtime, path: Path) -> None:
    try:
        with no_autocast():  # as it was captured: AOTInductor takes the program apart once more
            runtime.write(exported.program, path)
    except (OSError, OneLoRAError):
        raise
    except Exception as error:  # each has exceptions of its own
        name = type(exported.source.root).__name__
        raise ExportError(f"{runtime.title} can't take the exported program of {name}: {error}") from error


def _checked(exported: Exported, runtime: Runtime, path: Path) -> Parity:
    try:
        feed = runtime.run(path)
    except Exception as error:
        raise ExportError(f"{runtime.title} can't load what it wrote: {error}") from error
    return exported.check(feed, f"file for {runtime.title}")
