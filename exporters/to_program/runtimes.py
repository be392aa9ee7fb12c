"""How the file of each runtime is written from a program, and how it is run on the CPU.

pt2          torch.export.save, torch.export.load
aoti         AOTInductor: compiled for the device of the model, loaded by aoti_load_package
executorch   .pte with XNNPACK's delegate, run by ExecuTorch's Python runtime
openvino     .xml and .bin, run by OpenVINO's CPU plugin
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from onelora_compile.dynamo.private_api import load_aoti, write_aoti
from onelora_compile.errors import require
from onelora_compile.exporters.to_program.check import Feed


@dataclasses.dataclass(frozen=True)
class Runtime:
    """One runtime.

    Attributes:
        title: as its makers call it.
        endings: of the names of its files, the one that is opened first.
        write: writes the first file, and the others beside it.
        run: opens the first file.
        module: what has to be importable.
        bounded: whether it plans memory ahead, for the largest sizes that dynamic axes may have.
    """

    title: str
    endings: tuple[str, ...]
    write: Callable[[ExportedProgram, Path], None]
    run: Callable[[Path], Feed]
    module: str = "torch"
    bounded: bool = False

    def needed(self) -> None:
        """Check that the runtime is installed.

        Raises:
            MissingExtraError: it is not.
        """
        require(self.module, None, f"export to {self.title}")


def called(function: Callable[..., Any]) -> Feed:
    """What is called as the model is."""
    return lambda args, kwargs: pytree.tree_leaves(function(*args, **kwargs))


def _write_pt2(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _run_pt2(path: Path) -> Feed:
    return called(torch.export.load(path).module())


def _write_aoti(program: ExportedProgram, path: Path) -> None:
    write_aoti(program, str(path))


def _run_aoti(path: Path) -> Feed:
    return called(load_aoti(str(path)))


def _write_executorch(program: ExportedProgram, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def _run_executorch(path: Path) -> Feed:
    from executorch.runtime import Runtime as ExecuTorch

    method = ExecuTorch.get().load_program(path).load_method("forward")
    return lambda args, kwargs: [one.clone() for one in method.execute([*args, *kwargs.values()])]


def _write_openvino(program: ExportedProgram, path: Path) -> None:
    import openvino

    # Else weights are rounded to float16.
    openvino.save_model(openvino.convert_model(program), path, compress_to_fp16=False)


def _run_openvino(path: Path) -> Feed:
    import openvino

    # Else the CPU computes in bfloat16 where it can.
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def given(tensor: Tensor) -> Any:
        if tensor.dtype != torch.bfloat16:
            return openvino.Tensor(tensor.contiguous().numpy())
        halves = openvino.Tensor(openvino.Type.bf16, list(tensor.shape))  # NumPy has no such type
        halves.data[...] = tensor.contiguous().view(torch.float16).numpy()
        return halves

    def found(tensor: Any) -> Tensor:
        value = torch.from_numpy(tensor.data.copy())
        return value.view(torch.bfloat16) if tensor.element_type == openvino.Type.bf16 else value

    def feed(args: Sequence[Tensor], kwargs: dict[str, Tensor]) -> list[Tensor]:
        request = compiled.create_infer_request()
        request.infer([given(tensor) for tensor in [*args, *kwargs.values()]])
        return [found(tensor) for tensor in request.output_tensors]

    return feed


RUNTIMES = {
    "pt2": Runtime("torch.export", (".pt2",), _write_pt2, _run_pt2),
    "aoti": Runtime("AOTInductor", (".pt2",), _write_aoti, _run_aoti),
    "executorch": Runtime("ExecuTorch", (".pte",), _write_executorch, _run_executorch, "executorch.exir", True),
    "openvino": Runtime("OpenVINO", (".xml", ".bin"), _write_openvino, _run_openvino, "openvino"),
}
