"""The builder's progress on a bar with the time that is left, and Ctrl-C while it builds."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any, Iterator, NamedTuple, Sequence

_SURE = 5.0  # seconds of a phase before its steps tell anything
_MINUTES = 90  # seconds, and more are told in minutes


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


class Earlier(NamedTuple):
    """A build of the same model on the same device before: what the time that is left is estimated from.

    Attributes:
        seconds: how long it took.
        phases: each phase with its start, in seconds.
    """

    seconds: float
    phases: Sequence[Sequence[Any]] = ()

    def left(self, phase: str, elapsed: float, inside: float) -> float:
        """Seconds that are left, less than 0 if this build is slower; `inside` is how long `phase` has lasted."""
        begun = [float(start) for name, start in self.phases if name == phase]
        return self.seconds - (begun[-1] + inside if begun else elapsed)


class Line:
    """A bar for `building` on standard error: a line that is overwritten, or, where that is no terminal, one at times.

    One step may last minutes, and 8.x tells of none: within `with`, a thread writes on.

    Attributes:
        phases: each phase with its start, in seconds.
    """

    def __init__(self, earlier: Earlier | None = None, period: float | None = None) -> None:
        self.overwritten, self.earlier = sys.stderr.isatty(), earlier
        self.period = period or (1.0 if self.overwritten else 30.0)
        self.phase, self.total, self.done = "", 1, 0
        self.begun = self.entered = time.monotonic()
        self.phases: list[tuple[str, float]] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._write_on, daemon=True)

    def __enter__(self) -> Line:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        if self.overwritten:
            sys.stderr.write("\r\033[K")

    def start(self, phase: str, steps: int) -> None:
        """Begin a phase of a number of steps."""
        self.phase, self.total, self.done = phase, max(steps, 1), 0
        self.entered = time.monotonic()
        self.phases.append((phase, round(self.entered - self.begun, 1)))

    def step(self) -> None:
        """One step of the phase is done."""
        self.done = min(self.done + 1, self.total)  # a phase within takes the bar over

    def text(self) -> str:
        """What is done and what is left."""
        now = time.monotonic()
        elapsed, inside = now - self.begun, now - self.entered
        parts = [f"{self.done}/{self.total} {self.phase[:50]}"] if self.phase else []
        parts.append(f"{_time(elapsed)} so far")
        if self.earlier is not None:
            left = self.earlier.left(self.phase, elapsed, inside)
            before = f"the build before took {_time(self.earlier.seconds)}"
            parts.append(f"about {_time(left)} left" if left > 0 else before)
        elif 0 < self.done < self.total and inside > _SURE:
            parts.append(f"about {_time(inside * (self.total - self.done) / self.done)} left of this phase")
        return ", ".join(parts)

    def _write_on(self) -> None:
        while not self.over.wait(self.period):
            if self.overwritten:
                bar = "#" * (20 * self.done // self.total)
                sys.stderr.write(f"\r\033[K[{bar:<20}] {self.text()}")
            else:
                sys.stderr.write(f"building: {self.text()}\n")
            sys.stderr.flush()


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < _MINUTES else f"{seconds / 60:.0f} min"
