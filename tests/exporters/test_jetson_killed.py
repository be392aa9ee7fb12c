"""An update on a device that is killed at any of its calls of the system."""

import shutil
import subprocess
import sys

import bundles
import numpy as np
from bundles import ORT, active, call

from onelora_compile.weights.adapter_file import read_adapter

KILLER = """
import builtins, os, signal, sys
left = int(sys.argv.pop(1))
def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
class Torn:
    def __init__(self, file):
        self.file = file
    def __getattr__(self, name):
        return getattr(self.file, name)
    def __enter__(self):
        self.file.__enter__()
        return self
    def __exit__(self, *error):
        return self.file.__exit__(*error)
    def write(self, content):
        global left
        left -= 1
        if left == 0:
            self.file.write(bytes(content)[: len(content) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.file.write(content)
real = builtins.open
def opened(path, mode="r", *args, **kwargs):
    file = real(path, mode, *args, **kwargs)
    return Torn(file) if mode == "wb" else file
builtins.open = opened
for name in ("replace", "fsync", "unlink", "makedirs", "open"):
    setattr(os, name, counted(getattr(os, name)))
sys.path.insert(0, sys.argv.pop(1))
from onelora_device.commands import main
code = main(sys.argv[1:])
print("calls", 10**6 - left)
sys.exit(code)
"""


def killed(folder, calls, *args):
    return subprocess.run(
        [sys.executable, "-c", KILLER, str(calls), str(folder), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_killed_at_any_moment_a_device_has_the_old_adapter_or_the_new(tmp_path):
    sources = bundles.sources()
    folder = bundles.fresh("input", tmp_path)
    update = (*ORT, "update", sources / "new.safetensors", "--no-try")
    whole = killed(folder, 10**6, *update)
    assert whole.returncode == 0, whole.stderr
    total = int(whole.stdout.split()[-1])
    assert total > 12
    seen = []
    for calls in range(1, total + 1):
        shutil.rmtree(folder)
        folder = bundles.fresh("input", tmp_path)
        assert call(folder, "use", "a") == 0
        assert killed(folder, calls, *update).returncode == -9
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
