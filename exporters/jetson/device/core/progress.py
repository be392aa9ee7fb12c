"""The builder's progress on a bar, and Ctrl-C while it builds."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Iterator


@contextlib.contextmanager
def building(trt: Any, config: Any, bar: Any) -> Iterator[None]:
    """A block in which TensorRT builds with `config`, whose phases go to `bar` (`start(phase, steps)`, `step()`).

    Versions without IProgressMonitor (8.x) show nothing, and end at Ctrl-C only when they are done.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the builder has stopped.
    """
    base = getattr(trt, "IProgressMonitor", None)
    if base is None or not hasattr(config, "progress_monitor"):
        yield
        return
    interrupted: list[bool] = []
    outer: list[str] = []

    class Monitor(base):  # type: ignore[misc, valid-type]
        """TensorRT's phases: one within the other."""

        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            outer.append(phase_name)
            if len(outer) <= 2:  # deeper phases come by the thousand
                bar.start(phase_name, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in outer:
                outer.remove(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name in outer[:2]:
                    bar.step()
                return not interrupted
            except KeyboardInterrupt:  # must not pass through NVIDIA's code; False stops the builder
                interrupted.append(True)
                return False

    monitor = Monitor()  # the builder does not keep it
    config.progress_monitor = monitor
    yield
    if interrupted:
        raise KeyboardInterrupt


class Line:
    """A bar for `building`: one line on standard error, if that is a terminal, overwritten."""

    def __init__(self) -> None:
        self.show = sys.stderr.isatty()
        self.phase, self.total, self.done = "", 1, 0

    def start(self, phase: str, steps: int) -> None:
        """Begin a phase of a number of steps."""
        self.phase, self.total, self.done = phase, max(steps, 1), -1
        self.step()

    def step(self) -> None:
        """One step of the phase is done."""
        self.done = min(self.done + 1, self.total)  # a phase within takes the bar over
        if self.show:
            bar = "#" * (20 * self.done // self.total)
            sys.stderr.write(f"\r\033[K[{bar:<20}] {self.done}/{self.total} {self.phase[:50]}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Leave an empty line."""
        if self.show:
            sys.stderr.write("\r\033[K")
