"""A bundle's command line that is killed at its n-th call of the system; it takes n and the folder first."""

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
