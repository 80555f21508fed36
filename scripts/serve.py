"""ofa-serve: an exported network behind HTTP, one worker process for each core."""

from __future__ import annotations

import os
import tempfile

from omegaconf import DictConfig

from ofa.errors import UserError
from scripts.cli import make, stage_command


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
        settings = make(cfg.serve, model=str(cfg.model))
        Served.find(settings.model)  # a mistake is answered here, once, and not by every worker
        settings.to_environment()
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
        uvicorn.run(
            "ofa.serve.app:create",
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=settings.stop_seconds,
        )


if __name__ == "__main__":
    main()
