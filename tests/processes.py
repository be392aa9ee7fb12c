"""Programs that run in two processes of torch.distributed on this machine."""

import os
import runpy
import socket
import subprocess
import sys
from multiprocessing import connection
from pathlib import Path

from forks import FORKS, say_into


def torchrun(script: Path, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


def both_are_fine(code: str, folder: Path, *args):
    """Both processes reached the end of a program that is written to the folder, which prints "fine", rank there."""
    script = folder / "worker.py"
    script.write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"{rank}.log" for rank in range(2)]
    for log in logs:  # who is ended before it can say anything has said nothing
        log.touch()
    ranks = [FORKS.Process(target=_run, args=(rank, port, script, args, log)) for rank, log in enumerate(logs)]
    for one in ranks:
        one.start()
    connection.wait([one.sentinel for one in ranks], timeout=300)
    ended = [one.exitcode for one in ranks if not one.is_alive()]
    for one in ranks:
        one.join(0 if any(ended) else 300)  # who is left would wait for who has failed
        one.kill()
        one.join()
    said = [log.read_text() for log in logs]
    # Not "fine" alone, which is in "is not defined" too; the source lines of a traceback have no rank.
    found = [(one.exitcode, f"fine {rank}" in text) for rank, (one, text) in enumerate(zip(ranks, said, strict=True))]
    assert found == [(0, True)] * 2, "\n".join(text[-4000:] for text in said)


def _run(rank, port, script, args, log):
    """As torchrun runs a program."""
    say_into(log)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    sys.argv = [str(script), *map(str, args)]
    runpy.run_path(str(script), run_name="__main__")
