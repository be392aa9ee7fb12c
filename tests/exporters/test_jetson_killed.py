"""An update on a device that is killed at any of its calls of the system."""

import shutil

import bundles
import numpy as np
from bundles import ORT, active, call
from killer import calls_of, killed

from onelora_compile.weights.adapter_file import read_adapter


def test_killed_at_any_moment_a_device_has_the_old_adapter_or_the_new(tmp_path):
    sources = bundles.sources()
    folder = bundles.fresh("input", tmp_path)
    update = (*ORT, "update", sources / "new.safetensors", "--no-try")
    assert call(folder, "use", "a") == 0  # as below: folders that are there already take fewer calls
    total = calls_of(folder, *update)
    assert total > 12
    seen = []
    for calls in range(1, total + 1):
        shutil.rmtree(folder)
        folder = bundles.fresh("input", tmp_path)
        assert call(folder, "use", "a") == 0
        assert killed(calls, folder, *update)[0] == -9
        seen.append(active(folder))
        bundle = bundles.device(folder, "folder").Folder(str(folder))
        adapters = bundles.device(folder, "adapters")
        found = adapters.vectors_of(bundle, bundle.state()["adapter"])
        held = read_adapter(sources / f"{seen[-1]}.safetensors").vectors
        assert all(np.array_equal(found[name].numpy(), held[name].numpy()) for name in held)
        # The next try works, and leaves nothing behind.
        assert call(folder, "update", sources / "new.safetensors", "--no-try") == 0
        assert active(folder) == "new"
        assert not list((folder / "local" / "adapters").glob("*.tmp"))
    assert set(seen) == {"a", "new"}
    assert seen == sorted(seen)
