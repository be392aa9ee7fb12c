"""Folds in child processes that are killed, or whose folder is read-only; run as a program by test_fold_files.

    python fold_children.py MODEL ADAPTER OUT FOLDERS kill COUNT     one child for each of COUNT moments
    python fold_children.py MODEL ADAPTER OUT FOLDERS readonly 0     the folder of OUT can't be written

Every child works in a folder of its own, which begins with the model's files.  What a child raised is in its
`error.txt`.  MODEL and OUT are names in that folder.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from onelora_compile.exporters import fold_onnx

torch.set_num_threads(1)  # nothing may have started threads before the forks


class Counter:
    """Counts what Python calls and returns from, and kills the process at one of them."""

    def __init__(self, last=None):
        self.seen, self.last = 0, last

    def __call__(self, *_):
        self.seen += 1
        if self.seen == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def child(folder, work):
    """Run `work` in a fork; what it raised is written down."""
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            work()
        except BaseException as error:
            code = 1
            (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(code)
    os.waitpid(pid, 0)


def main(model, adapter, out, folders, fault, amount):
    source, folders, amount = Path(model), Path(folders), int(amount)
    total = folders / "total.txt"

    def fresh(name):
        folder = folders / name
        shutil.copytree(source.parent, folder)
        return folder

    def fold(folder):
        fold_onnx(folder / source.name, adapter, folder / out)

    def counted(folder, last=None):
        counter = Counter(last)
        sys.setprofile(counter)
        fold(folder)
        sys.setprofile(None)
        return counter.seen

    def unwritable(folder):
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (folder / "error.txt").touch()
        (folder / "error.txt").chmod(0o666)
        if os.getuid() == 0:
            os.setuid(65534)
        else:
            folder.chmod(0o555)
        fold(folder)

    fold(fresh("warm"))  # imports what a child without rights could not read
    if fault == "kill":
        whole = fresh("whole")
        child(whole, lambda: total.write_text(str(counted(whole))))
        events = int(total.read_text())
        for number in range(amount):
            folder = fresh(f"{number}")
            # More of the moments in the last fifth, where files are written.
            share = number / amount
            at = share * 1.6 * events if share < 0.5 else (0.8 + (share - 0.5) * 0.4) * events
            child(folder, lambda folder=folder, at=at: counted(folder, max(1, round(at))))
    else:
        folder = fresh("0")
        child(folder, lambda: unwritable(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
