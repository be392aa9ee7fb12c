"""Tensors, their files and quantiles in the program of a bundle, which has no NumPy of its own."""

import bundles
import numpy as np
import pytest


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32", "bool", "uint8"])
def test_npy_files(dtype, tmp_path):
    tensors = bundles.device(bundles.fresh("fold", tmp_path), "tensors")
    array = (np.arange(24).reshape(2, 3, 4) % 5).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    read = tensors.read_npy(str(tmp_path / "x.npy"))
    assert read.numpy().dtype == array.dtype
    np.testing.assert_array_equal(read.numpy(), array)
    (tmp_path / "y.npy").write_bytes(tensors.npy_bytes(read))
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), array)
    for shape in ((), (5,), (0, 2)):
        np.save(tmp_path / "z.npy", np.zeros(shape, dtype))
        again = tensors.read_npy(str(tmp_path / "z.npy"))
        (tmp_path / "w.npy").write_bytes(tensors.npy_bytes(again))
        assert np.load(tmp_path / "w.npy").shape == shape
    np.save(tmp_path / "f.npy", np.asfortranarray(np.ones((2, 3), dtype)))
    with pytest.raises(tensors.TensorError, match="column-major"):
        tensors.read_npy(str(tmp_path / "f.npy"))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    with pytest.raises(tensors.TensorError):
        tensors.read_npy(str(tmp_path / "cut.npy"))


def test_numbers_that_would_change_are_refused(tmp_path):
    tensors = bundles.device(bundles.fresh("fold", tmp_path), "tensors")
    wide = tensors.Tensor.of(np.array([1, 2**40]))
    assert tensors.Tensor.of(np.array([1, 7])).to("int32").values() == [1, 7]
    for value, dtype in ((wide, "int32"), (tensors.Tensor.of(np.array([1e10], np.float32)), "float16")):
        with pytest.raises(tensors.TensorError, match="do not fit"):
            value.to(dtype)
    with pytest.raises(tensors.TensorError, match="would be cut"):
        tensors.Tensor.of(np.array([1.5], np.float32)).to("int64")


def test_quantiles(tmp_path):
    measure = bundles.device(bundles.fresh("fold", tmp_path), "measure")
    latency = measure.Latency.of([number / 1000 for number in range(100, 0, -1)])
    assert (latency.p50, latency.p99) == pytest.approx((50, 99))
    assert measure.Latency.of([0.004]).p99 == pytest.approx(4)
