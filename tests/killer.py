"""A bundle's command line that is killed at its n-th call of the system."""

import builtins
import os
import signal
import sys
import tempfile

from forks import FORKS, say_into

ALL = 10**6  # more calls than any


class Torn:
    """A file of which half a write is left when the process is killed in it."""

    def __init__(self, file, counter):
        self.file, self.counter = file, counter

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def write(self, content):
        self.counter.left -= 1
        if self.counter.left == 0:
            self.file.write(bytes(content)[: len(content) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.file.write(content)


class Counter:
    """Kills its process at the n-th call."""

    def __init__(self, left):
        self.left = left

    def counted(self, function):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    def watch(self):
        real = builtins.open

        def opened(path, mode="r", *args, **kwargs):
            file = real(path, mode, *args, **kwargs)
            return Torn(file, self) if mode == "wb" else file

        setattr(builtins, "open", opened)  # noqa: B010
        for name in ("replace", "fsync", "unlink", "makedirs", "open"):
            setattr(os, name, self.counted(getattr(os, name)))


def killed(calls, folder, *args, double=False, **environment):
    """Its exit code and what it printed; `double`: with a double of TensorRT."""
    with tempfile.NamedTemporaryFile("r") as log:
        one = FORKS.Process(target=_run, args=(calls, str(folder), args, log.name, double, environment))
        one.start()
        one.join()
        return one.exitcode, log.read()


def calls_of(folder, *args, **options):
    """How many calls the whole command makes."""
    code, said = killed(ALL, folder, *args, **options)
    assert code == 0, said
    return int(said.split()[-1])


def _run(calls, folder, args, log, double, environment):
    say_into(log)
    os.environ |= environment
    tempfile.tempdir = None  # as the environment says
    if double:
        import tensorrt_double
        import tensorrt_rtx_bindings

        sys.modules["tensorrt"] = tensorrt_double.module(tensorrt_rtx_bindings)
    counter = Counter(calls)
    counter.watch()
    sys.path.insert(0, folder)
    from onelora_device.commands import main  # type: ignore[import-not-found]  # the bundle's own

    code = main([str(one) for one in args])
    print("calls", calls - counter.left)
    sys.exit(code)
