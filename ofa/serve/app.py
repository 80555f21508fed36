"""The HTTP service: POST /predict with one encoded image as its body, GET /health, GET /metrics (Prometheus).

curl --data-binary @cat.png localhost:8000/predict
{"class": "cat", "index": 3, "probability": 0.98, "top": [{"class": "cat", "probability": 0.98}, ...]}
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.export.latency import open_session
from ofa.extras import extra
from ofa.serve.batching import Batcher
from ofa.serve.images import RefusedError, check, prepare, read
from ofa.serve.settings import Served, Settings

TOP = 5
Probabilities = NDArray[np.float64]


def create() -> Any:
    """The FastAPI application of the settings in the environment; each worker process calls it once."""
    return application(Settings.from_environment())


def application(settings: Settings) -> Any:
    """The FastAPI application that serves one network."""
    fastapi, responses = extra("fastapi", "serve"), extra("fastapi.responses", "serve")
    routing = extra("starlette.routing", "serve")
    served, metrics = Served.find(settings.model), Metrics()
    batcher = Batcher(network(served, settings, metrics), batch=settings.batch, waiting=settings.waiting)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async with batcher:
            yield

    app = fastapi.FastAPI(title="ofa-serve", lifespan=lifespan, docs_url=None, redoc_url=None)

    bodies = Bodies(settings)

    async def answer(request: Any) -> Any:
        status, content = await _answer(request, settings, served, bodies, batcher)
        hang_up = {"connection": "close"} if status == 408 else None  # what comes of the body is read by nobody
        return responses.JSONResponse(content, status, headers=hang_up)

    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": served.file.name, "sha256": served.digest}

    # a plain route: FastAPI's own reads types and dependencies anew for each request
    app.router.routes.append(routing.Route("/predict", metrics.watched(answer), methods=["POST"]))
    app.get("/health")(health)
    app.get("/metrics")(lambda: responses.Response(metrics.text(), media_type=metrics.media_type))
    return app


def network(served: Served, settings: Settings, metrics: Metrics) -> Callable[[Sequence[bytes]], list[Any]]:
    """From encoded images to probabilities (K,) of each, or to the exception that it met."""
    session = open_session(served.file, settings.threads)
    name = session.get_inputs()[0].name

    def work(bodies: Sequence[bytes]) -> list[Probabilities | Exception]:
        answers: list[Any] = [_read(body, served) for body in bodies]
        good = [i for i, x in enumerate(answers) if not isinstance(x, Exception)]
        if good:
            metrics.batch.observe(len(good))
            logits = session.run(None, {name: prepare([answers[i] for i in good], served)})[0]
            for i, row in zip(good, softmax(logits), strict=True):
                answers[i] = row
        return answers

    return work


def softmax(logits: NDArray[np.float32]) -> Probabilities:
    """Probabilities (N, K)."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def _read(body: bytes, served: Served) -> NDArray[np.uint8] | Exception:
    try:
        return read(body, served)
    except RefusedError as error:
        return error


async def _answer(
    request: Any, settings: Settings, served: Served, bodies: Bodies, batcher: Batcher[bytes, Probabilities]
) -> tuple[int, dict[str, Any]]:
    """Status and content."""
    try:
        async with bodies.of(request) as body:
            check(body, settings.max_pixels)
            found = await batcher(body)
    except RefusedError as error:
        return error.status, {"error": error.reason}
    order = np.argsort(found)[::-1][:TOP]
    top = [{"class": served.classes[i], "probability": float(found[i])} for i in order]
    return 200, {"index": int(order[0]), **top[0], "top": top}


class Bodies:
    """The bodies of requests, received within the limits of one, of all that are held at once, and of time."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.held = settings, 0
        self._left = extra("starlette.requests", "serve").ClientDisconnect

    @asynccontextmanager
    async def of(self, request: Any) -> AsyncIterator[bytes]:
        """The body of a request, which counts as held until the block ends.

        Raises RefusedError: 413 where it is too large, 503 where others are, 408 where it takes too long, 499 (nginx's
        number) where the client left before it had sent all.
        """
        content = bytearray()
        try:
            await self._receive(request, content)
            yield bytes(content)
        finally:
            self.held -= len(content)

    async def _receive(self, request: Any, content: bytearray) -> None:
        most, all_most, seconds = self.settings.max_bytes, self.settings.held_bytes, self.settings.body_seconds
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise RefusedError(413, f"the body is larger than {most} bytes")
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    content += chunk
                    self.held += len(chunk)
                    if len(content) > most:
                        raise RefusedError(413, f"the body is larger than {most} bytes")
                    if self.held > all_most:
                        raise RefusedError(503, f"more than {all_most} bytes of images are held; try again later")
        except TimeoutError:
            raise RefusedError(408, f"the body was not there after {seconds} s") from None
        except self._left:
            raise RefusedError(499, "the client left before it had sent its image") from None


class Metrics:
    """Requests by status, their seconds, and images of each batch, of all workers together."""

    def __init__(self) -> None:
        self._client = prometheus = extra("prometheus_client", "serve")
        self.registry = prometheus.CollectorRegistry()
        given = {"registry": self.registry}
        self.requests = prometheus.Counter("ofa_requests", "requests by status", ["status"], **given)
        self.seconds = prometheus.Histogram("ofa_request_seconds", "seconds from head to answer", **given)
        sizes = [1, 2, 4, 8, 16, 32, 64]
        self.batch = prometheus.Histogram("ofa_batch_images", "images that ran at once", buckets=sizes, **given)
        self.media_type = prometheus.CONTENT_TYPE_LATEST

    def watched(self, answer: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        """The same handler, counted and timed."""

        async def handler(request: Any) -> Any:
            start, status = time.perf_counter(), 500  # where the answer raises
            try:
                response = await answer(request)
                status = response.status_code
                return response
            finally:
                self.requests.labels(status).inc()
                self.seconds.observe(time.perf_counter() - start)

        return handler

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = self._client.CollectorRegistry()
            extra("prometheus_client.multiprocess", "serve").MultiProcessCollector(registry)
        return self._client.generate_latest(registry)
