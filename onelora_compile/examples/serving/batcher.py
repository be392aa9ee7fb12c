"""Requests become batches: what came while the last batch ran is the next one, whichever adapters it is for.

No request waits for others to come: under little load a batch is one row, under much load it grows by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from onelora_compile.errors import ExportError
from onelora_compile.examples.serving.backends import Arrays, Backend


class BusyError(Exception):
    """More requests wait than may."""


@dataclasses.dataclass(frozen=True)
class _Request:
    adapter: str | None
    inputs: Arrays
    answer: asyncio.Future[Arrays]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [one.shape for one in self.inputs.values()]


class Batcher:
    """A queue before one back end; belongs to the event loop in which it `runs`.

    Attributes:
        batches: how many batches were computed.
        rows: how many requests these held.

    Args:
        backend: computes batches, one at a time, in a thread of its own.
        max_batch: the most requests of one batch.
        max_queue: the most requests that wait.
    """

    def __init__(self, backend: Backend, max_batch: int = 32, max_queue: int = 256) -> None:
        self._backend, self._max_batch, self._max_queue = backend, max_batch, max_queue
        self._waiting: list[_Request] = []
        self._arrived = asyncio.Event()
        self.batches = self.rows = 0

    @contextlib.asynccontextmanager
    async def runs(self) -> AsyncIterator[None]:
        """Inside, requests are answered."""
        with ThreadPoolExecutor(1, "batches") as thread:
            task = asyncio.create_task(self._serve(thread))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def predict(self, adapter: str | None, inputs: Arrays) -> Arrays:
        """The outputs of one example.

        Raises:
            BusyError: the queue is full.
            Exception: what the back end raises of this request.
        """
        if len(self._waiting) >= self._max_queue:
            raise BusyError(f"{self._max_queue} requests wait already: try again in a moment")
        request = _Request(adapter, inputs, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._arrived.set()
        return await request.answer

    async def _serve(self, thread: ThreadPoolExecutor) -> None:
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not self._waiting:
                self._arrived.clear()
            if batch:
                await self._answer(thread, batch)

    def _next_batch(self) -> list[_Request]:
        """The oldest request, and others of its shapes; who went away is left out."""
        waiting = [one for one in self._waiting if not one.answer.done()]
        batch = [one for one in waiting if one.shapes == waiting[0].shapes][: self._max_batch]
        taken = {id(one) for one in batch}
        self._waiting = [one for one in waiting if id(one) not in taken]
        return batch

    async def _answer(self, thread: ThreadPoolExecutor, batch: Sequence[_Request]) -> None:
        try:
            outputs = await asyncio.get_running_loop().run_in_executor(thread, self._computed, batch)
        except Exception as error:
            if len(batch) > 1:  # one row may be the reason: the others get their answers
                for one in batch:
                    await self._answer(thread, [one])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        self.batches, self.rows = self.batches + 1, self.rows + len(batch)
        for row, one in enumerate(batch):
            if not one.answer.done():
                one.answer.set_result({name: values[row] for name, values in outputs.items()})

    def _computed(self, batch: Sequence[_Request]) -> Arrays:
        inputs = {name: np.stack([one.inputs[name] for one in batch]) for name in batch[0].inputs}
        outputs = self._backend.run([one.adapter for one in batch], inputs)
        if strange := [name for name, value in outputs.items() if not value.ndim or len(value) != len(batch)]:
            raise ExportError(f"the outputs {strange} have no row for each example")
        return outputs
