"""A compiled program in a C++ process, as a server without Python has it: other vectors, the same package."""

import subprocess
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import cpp_extension

import onelora_compile as onelora
from onelora_compile.exporters import export_runtime
from onelora_compile.testing import assert_parity, fill_vectors, merged_copy

pytestmark = pytest.mark.slow  # a minute of compiling PyTorch's headers

# Each argument after the package is rows, columns (0: one axis) and a file of float32.
MAIN = """
#include <cstdio>
#include <fstream>
#include <iterator>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <ATen/ATen.h>

at::Tensor read(long rows, long columns, const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  auto shape = columns ? std::vector<int64_t>{rows, columns} : std::vector<int64_t>{rows};
  return at::from_blob(bytes.data(), shape, at::kFloat).clone();
}

int main(int count, char** words) {
  torch::inductor::AOTIModelPackageLoader model(words[1]);
  std::vector<at::Tensor> inputs;
  for (int at = 2; at < count; at += 3) inputs.push_back(read(atol(words[at]), atol(words[at + 1]), words[at + 2]));
  auto output = model.run(inputs).at(0).contiguous();
  fwrite(output.data_ptr(), sizeof(float), output.numel(), stdout);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The C++ program, against PyTorch's own libraries."""
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "main.cpp").write_text(MAIN)
    (library,) = cpp_extension.library_paths()
    headers = [f"-I{path}" for path in cpp_extension.include_paths()]
    linked = [f"-L{library}", f"-Wl,-rpath,{library}", "-ltorch", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = ["g++", "-std=c++20", "-O0", abi, *headers, folder / "main.cpp", "-o", folder / "main", *linked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "main"


def small(seed=0):
    torch.manual_seed(0)
    layers = {"up": nn.Linear(6, 8), "act": nn.GELU(), "down": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
    model = nn.Sequential(OrderedDict(layers)).eval()  # not in the order of their names
    return fill_vectors(onelora.adapt(model), 0.1, seed)


def run(program, package, folder, *inputs):
    words = []
    for number, tensor in enumerate(inputs):
        path = folder / f"{number}.bin"
        path.write_bytes(tensor.detach().numpy().tobytes())
        words += [*tensor.shape, *[0] * (2 - tensor.ndim), path]
    done = subprocess.run([program, package, *map(str, words)], capture_output=True, check=True)
    return torch.from_numpy(np.frombuffer(done.stdout, np.float32).copy()).reshape(len(inputs[0]), -1)


@pytest.mark.parametrize("mode", ["fold", "input"])
def test_a_package_in_cpp(mode, program, tmp_path):
    model, x = small(), torch.randn(5, 6)
    report = export_runtime(
        model,
        (torch.randn(4, 6),),
        tmp_path / "m.pt2",
        runtime="aoti",
        adapters=mode,
        dynamic_shapes=({0: "batch"},),
    )
    adapters = [model] if mode == "fold" else [model, small(seed=1), fill_vectors(small(), 0.0)]
    found = []
    for one in adapters:
        given = onelora.vectors(one).values() if mode == "input" else ()
        found.append(run(program, report.files[0], tmp_path, x, *given))
        assert_parity(found[-1], merged_copy(one, torch.float64)(x.double()), merged_copy(one)(x), floor=8)
    base = merged_copy(fill_vectors(small(), 0.0))(x)
    assert all(not torch.allclose(found[0], other, atol=1e-3) for other in [base, *found[1:]])
