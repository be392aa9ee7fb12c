"""Scripts that run in two processes of torch.distributed on this machine."""

import os
import subprocess
import sys
from pathlib import Path


def torchrun(script: Path, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


def both_are_fine(code: str, folder: Path, *args):
    """Both processes reached the end of a program that is written to the folder, which prints "fine" there."""
    script = folder / "worker.py"
    script.write_text(code)
    done = torchrun(script, *args)
    assert done.stdout.count("fine") == 2, done.stdout[-2000:] + done.stderr[-4000:]
