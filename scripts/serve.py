"""ofa-serve: an exported network behind HTTP, one worker process for each core."""

from __future__ import annotations

import os
import socket
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ofa.errors import UserError
from scripts.cli import make, stage_command

if TYPE_CHECKING:
    from ofa.serve.settings import Settings


@stage_command("serve")
def main(cfg: DictConfig) -> None:
    """Serve model=<card or ONNX file>: POST /predict with an image as its body, GET /health, GET /metrics."""
    from ofa.extras import extra
    from ofa.serve.settings import Served

    if cfg.model is None:
        raise UserError(
            "model has no value; give model=<card or ONNX file>, such as runs/digits/export/phone/int8.json"
        )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # read where prometheus_client is first imported
        for module in ("fastapi", "prometheus_client"):
            extra(module, "serve")
        uvicorn = extra("uvicorn", "serve")
        extra("uvicorn.supervisors", "serve")
        settings = make(cfg.serve, model=str(cfg.model))
        served = Served.find(settings.model)  # a mistake is answered here, once, and not by every worker
        if served.caution:
            print(served.caution)
        settings.to_environment()
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
        _serve(uvicorn, settings)


def _serve(uvicorn: Any, settings: Settings) -> None:
    """Run until a signal stops it, in one process or in several that share the socket."""
    config = uvicorn.Config(
        "ofa.serve.app:create",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=settings.stop_seconds,
    )
    address = f"http://{settings.host}:{settings.port}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        given, reason = f"serve.host={settings.host} serve.port={settings.port}", str(error.strerror).partition(" (")[0]
        raise UserError(f"cannot listen at {given}: {reason}; give another port or host") from None
    listening.set_inheritable(True)
    print(f"{settings.model} starts at {address}: POST /predict, GET /health, /metrics; Ctrl-C stops it")
    print(f"next: curl --data-binary @<image> {address}/predict", flush=True)
    # every connection inherits it; asyncio sets it only where it made the socket, and answers then wait 40 ms
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(KeyboardInterrupt):  # the signal that stopped it, which it passes on when all is answered
        if settings.workers == 1:
            uvicorn.Server(config).run(sockets=[listening])
        else:
            uvicorn.supervisors.Multiprocess(config, sockets=[listening]).run()


if __name__ == "__main__":
    main()
