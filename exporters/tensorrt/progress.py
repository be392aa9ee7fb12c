"""The builder's progress as a bar, and Ctrl-C while it builds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from onelora_compile.exporters.tensorrt.library import Api
from onelora_compile.progress import counting


@contextlib.contextmanager
def building(api: Api, config: Any, title: str, show: bool) -> Iterator[None]:
    """A block in which TensorRT builds with `config`.

    Versions without IProgressMonitor (8.x) build without a bar, and end at Ctrl-C only when they are done.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the builder has stopped.
    """
    base = getattr(api.trt, "IProgressMonitor", None)
    if base is None or not hasattr(config, "progress_monitor"):
        yield
        return
    interrupted: list[bool] = []
    with counting(title, show) as count:
        outer: list[str] = []

        class Monitor(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                super().__init__()

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                outer.append(phase_name)
                if len(outer) <= 2:  # deeper phases come by the thousand
                    count.start(phase_name, num_steps)

            def phase_finish(self, phase_name: str) -> None:
                if phase_name in outer:
                    outer.remove(phase_name)

            def step_complete(self, phase_name: str, step: int) -> bool:
                try:
                    if phase_name in outer[:2]:
                        count.step()
                    return not interrupted
                except KeyboardInterrupt:  # must not pass through NVIDIA's code; False stops the builder
                    interrupted.append(True)
                    return False

        monitor = Monitor()  # the builder does not keep it
        config.progress_monitor = monitor
        yield
    if interrupted:
        raise KeyboardInterrupt
