"""Dynamic micro-batching: what arrives while the network is busy runs together when it is free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from ofa.serve.images import RefusedError

In = TypeVar("In")
Out = TypeVar("Out")


class Batcher(Generic[In, Out]):
    """Runs `work` on one thread, for 1 to `batch` items at once; `waiting` items at most wait for their turn.

    work: from items to as many answers, of which an exception is raised for its item alone.  Use it as an asynchronous
    context; leaving it answers what waits.
    """

    def __init__(self, work: Callable[[Sequence[In]], Sequence[Out | Exception]], *, batch: int, waiting: int) -> None:
        self.work, self.batch = work, batch
        self.queue: asyncio.Queue[tuple[In, asyncio.Future[Out]]] = asyncio.Queue(waiting)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="network")

    async def __aenter__(self) -> Batcher[In, Out]:
        """Start to serve the queue."""
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *error: object) -> None:
        """Answer what waits, then stop."""
        await self.queue.join()
        self._task.cancel()
        self._pool.shutdown()

    async def __call__(self, item: In) -> Out:
        """The answer to one item; raises RefusedError (503) where too many wait."""
        answer: asyncio.Future[Out] = asyncio.get_running_loop().create_future()
        try:
            self.queue.put_nowait((item, answer))
        except asyncio.QueueFull:
            raise RefusedError(503, f"{self.queue.maxsize} images are waiting; try again later") from None
        return await answer

    async def _serve(self) -> None:
        while True:
            taken = [await self.queue.get()]
            while len(taken) < self.batch and not self.queue.empty():
                taken.append(self.queue.get_nowait())
            await self._answer(taken)
            for _ in taken:
                self.queue.task_done()

    async def _answer(self, taken: list[tuple[In, asyncio.Future[Out]]]) -> None:
        items = [item for item, _ in taken]
        answers: Sequence[Out | Exception]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._pool, self.work, items)
        except Exception as error:  # the server lives on, whatever happened to this batch
            answers = [error] * len(items)
        for (_, future), answer in zip(taken, answers, strict=True):
            if future.done():  # its client has gone
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
