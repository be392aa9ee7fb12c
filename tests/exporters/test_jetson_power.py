"""A device whose power is cut: whatever its disk has kept of an update, the adapter before is in use or the new one."""

import bundles
import numpy as np
import power_cut
import pytest
from bundles import ORT

from onelora_compile.weights.adapter_file import read_adapter

UPDATE = ("update", "new", "--no-try")


def in_use(folder):
    """The adapter in use, whose file is the one that was sent."""
    bundle = bundles.device(folder, "folder").Folder(str(folder))
    adapter = bundle.state()["adapter"]
    found = bundles.device(folder, "adapters").vectors_of(bundle, adapter)
    source = "c" if adapter["name"] == "default" else adapter["name"]
    held = read_adapter(bundles.sources() / f"{source}.safetensors").vectors
    assert all(np.array_equal(found[name].numpy(), held[name].numpy()) for name in held)
    return adapter["name"]


def with_onnxruntime(folder, *args):
    sent = [str(bundles.sources() / "new.safetensors") if one == "new" else one for one in args]
    return bundles.run(folder, *ORT, *sent)


@pytest.mark.parametrize(
    ("before", "command", "ends"),
    [
        ((), UPDATE, ("default", "new")),
        ((("use", "a"),), UPDATE, ("a", "new")),
        ((), ("use", "a"), ("default", "a")),
        ((UPDATE,), ("rollback",), ("new", "default")),
    ],
)
def test_the_adapter_in_use_is_the_one_before_or_the_new_one(before, command, ends, tmp_path):
    folder = bundles.fresh("input", tmp_path)
    for one in before:
        assert with_onnxruntime(folder, *one) == 0
    with power_cut.watched(folder) as disk:
        assert with_onnxruntime(folder, *command) == 0
    seen = []
    for over, content in disk.states():
        power_cut.write(content, folder)
        seen.append(in_use(folder))
        assert with_onnxruntime(folder, "status") == 0
        assert seen[-1] == ends[1] or not over  # what was said to be done is
        assert with_onnxruntime(folder, *UPDATE) == 0
        assert in_use(folder) == "new"
        assert not list((folder / "local" / "adapters").glob("*.tmp"))
    assert set(seen) == set(ends)
