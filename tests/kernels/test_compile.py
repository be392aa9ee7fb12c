"""The kernel compiled without a GPU, for A100 (sm_80), Jetson Orin (sm_87) and H100 (sm_90)."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from onelora_compile.kernels import configs
from onelora_compile.kernels.rank1_matmul import rank1_matmul_kernel

SHARED = {80: 163 * 1024, 87: 163 * 1024, 90: 227 * 1024}  # bytes that one program may use; CUDA C++ guide, table 30
REGISTERS = 65536  # of a multiprocessor, all of these
FLAGS = ("HAS_BIAS", "HAS_ROW", "HAS_COLUMN", "HAS_LEFT")
USES = {"forward": (True, False, True, False), "backward": (False, True, False, True)}
CASES = [
    pytest.param(element, tile, use, id=f"{element}-{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}-{use}", marks=marks)
    for element, size, marks in (("bf16", 2, ()), ("fp16", 2, pytest.mark.slow), ("fp32", 4, ()))
    for use in USES
    for tile in configs.tiles(size, use == "backward")
]


def compiled(element, tile, use, capability, precision="ieee", ones=None, aligned=True):
    """As a call specialises it: aligned pointers and sizes, what is 1 (`ones`; None: the last stride of x and W)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = rank1_matmul_kernel.arg_names
    constants = dict(zip(FLAGS, USES[use], strict=True)) | tile.blocks | {"PRECISION": precision, "WIDEN": False}
    ones = ("stride_ak", "stride_wk" if use == "forward" else "stride_wn") if ones is None else ones
    constants |= dict.fromkeys(ones, 1)
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names}
    types |= {name: f"*{element}" for name in ("a_ptr", "w_ptr", "bias_ptr", "out_ptr")}
    types |= dict.fromkeys(constants, "constexpr")
    place = {name: (index,) for index, name in enumerate(names)}
    sixteens = [name for name in names if types[name] != "constexpr" and name != "M"] if aligned else []
    attributes = {place[name]: [["tt.divisibility", 16]] for name in sixteens}
    values = {place[name]: value for name, value in constants.items()}
    source = ASTSource(rank1_matmul_kernel, {name: types[name] for name in names}, values, attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **configs.OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(kernel, folder):
    """Registers of a thread, and bytes of local memory (spilled registers among them)."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{what}:(\d+)", text)[0]) for what in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize(("element", "tile", "use"), CASES)
def test_fits_and_does_not_spill(element, tile, use, capability, tmp_path):
    kernel = compiled(element, tile, use, capability)
    assert kernel.metadata.shared <= SHARED[capability]
    registers, local = usage(kernel, tmp_path)
    assert local == 0
    assert registers * 32 * tile.num_warps <= REGISTERS  # at least one program fits
    ptx = kernel.asm["ptx"]
    assert "cp.async" in ptx  # loads run ahead
    if element != "fp32":
        assert ("wgmma" if capability == 90 and tile.BLOCK_M >= 64 else "mma.sync") in ptx  # tensor cores


@pytest.mark.parametrize("capability", SHARED)
def test_single_precision_uses_tensor_cores_where_tf32_is_allowed(capability):
    tile = configs.SINGLE[2]
    assert "mma" not in compiled("fp32", tile, "forward", capability).asm["ptx"]
    assert "mma" in compiled("fp32", tile, "forward", capability, "tf32").asm["ptx"]


@pytest.mark.parametrize("ones", [(), ("M",), ("N",), ("K",), ("M", "N", "K"), ("stride_am", "stride_wn")], ids=str)
@pytest.mark.parametrize("use", USES)
def test_sizes_of_one_odd_sizes_and_any_strides(use, ones):
    """A size or stride of 1 becomes a constant of the kernel; odd ones lose their alignment."""
    assert compiled("bf16", configs.HALF[0], use, 87, ones=ones, aligned=False).asm["cubin"]


def test_a_tile_that_is_too_large_is_seen(tmp_path):
    kernel = compiled("bf16", configs.Tile(256, 128, 32, 8, 3), "backward", 80)
    assert usage(kernel, tmp_path)[1] > 0
