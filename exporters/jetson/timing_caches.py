"""What other devices have timed: packed with a bundle, so that the first build of a fleet's next device is short."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from onelora_compile.errors import ConfigError

_NAME = re.compile(r"timing-tensorrt-[0-9.]+-[0-9]+\.[0-9]+\.cache")  # as trt_build.py of the device names them


def check_timings(paths: Sequence[Path]) -> None:
    """Whether files are what a device keeps: by their names, which say of which TensorRT and GPU they are.

    Raises:
        ConfigError: another name, the same one twice, or an empty file.
    """
    for path in paths:
        if not _NAME.fullmatch(path.name) or not path.is_file() or not path.stat().st_size:
            raise ConfigError(
                f"timing_caches: {path} is not a file that `build` kept on a device, as "
                "local/engines/timing-tensorrt-10.3.0-8.7.cache: leave its name as it is"
            )
    if len({path.name for path in paths}) < len(paths):
        raise ConfigError("timing_caches: two of one TensorRT and GPU: give the newer one")


def write_timings(folder: Path, paths: Sequence[Path]) -> None:
    """Copy them into a bundle."""
    for path in paths:
        (folder / "timing").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "timing" / path.name)
