"""Export a model with its adapter to ONNX."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onelora_compile.adapting.adapter_state import adapted_weights, state_or_none
from onelora_compile.errors import ConfigError, ExportError, one_of, require
from onelora_compile.exporters.calls.axes import Axes, axes_of
from onelora_compile.exporters.calls.compare import Parity
from onelora_compile.exporters.calls.names import Names, chosen_names, name_graph
from onelora_compile.exporters.calls.quiet import quiet
from onelora_compile.exporters.calls.signature import Call
from onelora_compile.exporters.half.choose import AUTO
from onelora_compile.exporters.half.convert import fit_inputs, to_float16
from onelora_compile.exporters.half.lost import loses
from onelora_compile.exporters.half.runs import Runs
from onelora_compile.exporters.jetson.device.core.modes import BASE, EXPORTED, FOLD, IDS, MODES
from onelora_compile.exporters.onnx_file.metadata import Metadata
from onelora_compile.exporters.onnx_file.save import bytes_of, save_model
from onelora_compile.exporters.onnx_runtime.verify import check_export
from onelora_compile.exporters.opsets.lower import lower_opset
from onelora_compile.exporters.to_onnx.bank_sources import PlaceNumbers
from onelora_compile.exporters.to_onnx.operators import translations
from onelora_compile.exporters.to_onnx.place_vectors import place_vectors
from onelora_compile.exporters.to_onnx.read_bank import carrying, read_bank
from onelora_compile.exporters.to_onnx.small_constants import small_constants_kept
from onelora_compile.exporters.to_program.capture import Frozen, VectorPlace
from onelora_compile.exporters.to_program.report import ExportReport
from onelora_compile.exporters.to_program.source import Source, exportable
from onelora_compile.file_names import as_file, as_paths
from onelora_compile.looking.process_flags import no_autocast
from onelora_compile.progress import steps
from onelora_compile.version import __version__
from onelora_compile.weights.adapter_content import digest
from onelora_compile.weights.atomic_write import refuse_overwriting
from onelora_compile.weights.file_kinds import refuse_other_kinds
from onelora_compile.weights.fingerprint import fingerprint_of

if TYPE_CHECKING:
    import onnx_ir
    from torch.export import ExportedProgram

OLDEST, NEWER = 17, 18  # what torch.onnx writes begins at NEWER; the one before is rewritten here
_PLACES: dict[str, VectorPlace] = {"fold": "folded", "load": "weight", "input": "activation", "bank": "activation"}


def export_onnx(
    model: nn.Module,
    args: Sequence[Any] | Tensor,
    path: str | os.PathLike[str],
    kwargs: Mapping[str, Any] | None = None,
    adapters: str = "fold",
    dynamic_shapes: Any = None,
    opset_version: int | None = None,
    dtype: torch.dtype | None = None,
    bank: Sequence[str | os.PathLike[str]] = (),
    verify: bool = True,
    external_data: bool | None = None,
    progress: bool = True,
    input_names: Names = None,
    output_names: Names = None,
    keep_float32: str | Sequence[str] | None = None,
    calibration: Any = None,
) -> ExportReport:
    """Export a model, adapted or not, to an ONNX file, and check that file in ONNX Runtime.

    The model is exported in evaluation mode and is not changed, also when it is compiled; nor are the inputs, of which
    a cache of transformers (`past_key_values`) is one: its tensors are inputs and outputs of the file.

    Args:
        model: the model.
        args: example inputs, in the dtypes and on the device of the model.
        path: the file to write; replaced in one step if it exists.
        kwargs: example keyword inputs.
        adapters: where the vectors are.
            "fold": inside the weights; the graph is that of the base.
            "load": external initializers in `<path>.vectors`, added to the weights; ONNX Runtime folds them when it
            opens the model, with these values or with others (`SessionOptions.add_external_initializers`).
            "input": graph inputs with the trained values as defaults; ONNX Runtime adapters, another one per call.
            "bank": tables of several adapters, chosen for each row of the batch by the input `adapter_ids` [batch].
        dynamic_shapes: as in `torch.export.export`; a dimension may be a name: `{"x": {0: "batch"}}`. What holds
            several tensors may have one entry for all: `{"past_key_values": {0: "batch", 2: "past"}}`. `"batch"` alone
            names the first axis of all inputs that agree in its size, wherever the model lets it vary; beside other
            entries write `{"*": "batch", ...}`.
        opset_version: None is the exporter's recommended one; 17 is the oldest.
        dtype: convert to float16 or bfloat16 on the way; folded weights are rounded once. Inputs are of that dtype too.
        bank: adapter files, for "bank"; the id of each is its place. The model may be adapted or not.
        verify: run the file on the example inputs, compare with eager, and fail beyond the dtype's tolerance; vectors
            that can be swapped are compared with other values too.
        external_data: keep the weights in `<path>.data`; None does so from 1.9 GB on.
        progress: show a progress bar if standard error is a terminal.
        input_names: of the tensors among the inputs, in order, or `{name: another}` for some. Without: those of the
            arguments; of a tensor inside an argument, the way to it (`boxes.0`, `past_key_values.0.key`).
        output_names: of the tensors among the outputs, in the same way. Without: the keys of a mapping or a dataclass
            (`logits`), `output_0`, ... of a tuple, `present.0.key`, ... of a cache.
        keep_float32: with `dtype=torch.float16`, which operators stay in float32. "auto": sums, softmax, norms that are
            written out, and what reads or makes values that float16 can't hold, on the inputs, with a margin of 8.
            Names of operators or of what they make, `*` for any part; names beside "auto" stay too. An input or
            output that float16 can't hold stays in float32. None converts everything. Vectors are float32 in any case,
            and so is what reads a constant that float16 makes zero or infinite, as the 1e-8 that guards a division.
        calibration: inputs for "auto", in the form that `fold_onnx` takes, by the names of the file's inputs; None is
            the example. Ranges are measured with the vectors, without, and with every adapter of a bank.

    Raises:
        ExportError: the model can't be exported so, or the file differs from the model; no file is left then, and an
            old one is as it was.
        ConfigError: an unknown value of `adapters`, a bank without files, names that are too few, too many, unknown or
            taken, an axis that no input has; `keep_float32` without float16, or a name that the file does not have.
        StateError: "load" or "input" of a model that is not adapted; a `disabled` block is open.
        AdapterFileError: a file of the bank that is damaged or of another model.
        BaseMismatchError: a file of the bank that was trained on another base.
        MissingExtraError: an ONNX package is not installed.
        OSError: the file can't be written.
    """
    one_of("adapters", adapters, EXPORTED)
    path, bank = as_file(path, "path"), as_paths(bank, "bank")
    if bool(bank) != MODES[adapters].feeds_ids:
        raise ConfigError("adapters='bank' needs bank=[files], and only that takes it")
    if opset_version is not None and opset_version < OLDEST:
        raise ConfigError(f"opset_version={opset_version}: {OLDEST} is the oldest that a model can be written in")
    _check_kept(keep_float32, calibration, dtype)
    refuse_overwriting(path, bank, "path")
    refuse_other_kinds(path, ".onnx", "path")
    mode = MODES[adapters]
    require("onnxscript", "onnx", "export to ONNX")
    if verify:
        require("onnxruntime", "onnx", "verify the export (or pass verify=False)")
    start = time.perf_counter()
    root = exportable(model, mode, banked=bool(bank))
    with steps(f"export {path.name}", 4, progress) as step, carrying(root, bank):
        step("read the base")
        source = Source.of(root, mode)
        adapted, trained, held = source.adapted, source.trained, source.values
        state = state_or_none(adapted)
        prints = {name: fingerprint_of(target) for name, target in adapted_weights(adapted).items()}
        banked = read_bank(adapted, trained, bank)
        step("capture")
        call = Call.of(root, args, kwargs)
        call.check()
        axes = axes_of(dynamic_shapes, root, call)
        taken = {} if mode is FOLD else dict.fromkeys(held, "a vector of the adapter")
        taken |= {IDS: "the ids of a bank"} if mode.feeds_ids else {}
        inputs = chosen_names("input", list(call.tensors), input_names, taken)

        def captured(kept: str | Sequence[str] | None) -> tuple[list[Tensor], Frozen]:
            # What stays in float32 is never rounded: the program is captured wide, and converted as a file.
            wanted = dtype if kept is None else _wide(root)
            given = [_cast(tensor, wanted) for tensor in call.tensors.values()]
            fed = Call.of(root, *call.with_tensors(given))
            return given, source.captured(fed, axes, _PLACES[adapters], wanted, dtype)

        given, frozen = captured(keep_float32)
        if keep_float32 is None and dtype is torch.float16 and loses(frozen.program, source.originals):
            given, frozen = captured(keep_float32 := ())
        taken |= dict.fromkeys(inputs, "an input")
        outputs = chosen_names("output", frozen.outputs, output_names, taken)
        folded = source.named(frozen.folded)
        step("convert to ONNX")
        ir_model = _converted(frozen.program, opset_version, frozen.axes)
        places = PlaceNumbers(held if mode.feeds_ids else {})
        used = (
            place_vectors(ir_model, mode, held, [*banked.values(), *places.adapters], source.part, trained.originals)
            if mode is not FOLD
            else list(folded.losses)
        )
        name_graph(ir_model, inputs, outputs)
        tables = places.take_out(ir_model) if mode.feeds_ids else {}
        _in_opset(ir_model, opset_version)
        mixed = None
        if keep_float32 is not None:
            arrays = {name: tensor.detach().cpu().numpy() for name, tensor in zip(inputs, given, strict=True)}
            whole = [name for name in used if name in trained.bases]
            samples = arrays if calibration is None else calibration
            runs = Runs(mode, used, held, len(banked), samples, inputs, zeros=not whole)
            added = [name for name in used if name not in whole and mode is not FOLD]
            mixed = to_float16(ir_model, keep_float32, lambda: runs.measured(ir_model), added, whole)
            given = [torch.from_numpy(array) for array in fit_inputs(ir_model, arrays).values()]
        metadata = Metadata(
            mode=adapters if held else BASE.name,
            vectors={name: held[name].shape for name in used},
            fingerprints={name: prints[name] for name in used if name in prints},
            trained={name: trained.bases[name] for name in used if name in trained.bases},
            constant=(
                trained.constants(frozen.program, used) | dict.fromkeys(folded.unused, "") if mode is not FOLD else {}
            ),
            adapters=tuple(banked),
            digests=tuple(digest({name: one[name] for name in used if name in one}) for one in banked.values()),
            tables=tables,
            sha256=digest(held) if held else "",
            producer=f"onelora-compile {__version__}, torch {torch.__version__}",
            uses=dict(state.uses) if state is not None else {},
        )
        ir_model.metadata_props.update(metadata.to_props())
        step("write and verify" if verify else "write")
        # Verified before it gets its name: a file that is there is a file that passed.
        parity: list[Parity] = []

        def check(written: Path) -> None:
            if verify:
                parity.append(check_export(written, root, call, given, list(banked.values()), inside=dtype))

        files = save_model(ir_model, path, external_data, check, apart=used if mode.rebuilds else ())
    return ExportReport(
        files=files,
        bytes=bytes_of(files),
        runtime="ONNX Runtime",
        opset_version=ir_model.opset_imports[""],
        mode=metadata.mode,
        vectors=len(used),
        losses=folded.losses,
        unused=folded.unused,
        captured_for=frozen.captured_for,
        mixed=mixed,
        parity=parity[0] if parity else None,
        seconds=time.perf_counter() - start,
    )


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _wide(root: nn.Module) -> torch.dtype | None:
    """The dtype to capture a model in so that nothing is narrower than float32; None is its own."""
    held = [*root.parameters(), *root.buffers()]
    return torch.float32 if any(one.dtype in (torch.float16, torch.bfloat16) for one in held) else None


def _check_kept(keep: str | Sequence[str] | None, calibration: Any, dtype: torch.dtype | None) -> None:
    if keep is not None and dtype is not torch.float16:
        raise ConfigError(f"keep_float32={keep!r} is for dtype=torch.float16; dtype is {dtype}")
    if calibration is not None and (keep is None or AUTO not in ([keep] if isinstance(keep, str) else keep)):
        raise ConfigError("calibration is for keep_float32='auto', which measures ranges on it")


def _converted(program: ExportedProgram, opset_version: int | None, axes: Sequence[Axes]) -> onnx_ir.Model:
    # Without autocast and gradients, as it was captured: with gradients, attention has other kernels with other
    # strides, and a view that was captured for the one layout fails on the other.
    with quiet("torch.onnx", "onnxscript", "onnx_ir"), no_autocast(), torch.no_grad(), small_constants_kept():
        try:
            converted = torch.onnx.export(
                program,
                opset_version=opset_version and max(opset_version, NEWER),
                dynamic_shapes=tuple(axes) if any(axes) else None,  # the names of dynamic axes
                dynamo=True,
                verbose=False,
                custom_translation_table=translations(),
            )
        except Exception as error:
            raise ExportError(f"torch.onnx can't convert the captured program: {error}") from error
    assert converted is not None
    return converted.model


def _in_opset(model: onnx_ir.Model, opset_version: int | None) -> None:
    """Hold the model to the opset that was asked for: torch.onnx may write another one without a word."""
    if opset_version is not None:
        lower_opset(model, opset_version)
    if opset_version not in (None, found := model.opset_imports[""]):
        raise ExportError(f"opset_version={opset_version} was asked for, torch.onnx wrote {found}")
