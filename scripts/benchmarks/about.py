"""Where and with what a benchmark ran; every script prints it and writes it beside its figures."""

from __future__ import annotations

import os
import sys
from typing import Any

from ofa import processor
from ofa.files import versions


def about() -> dict[str, Any]:
    """Processor, cores of this process, PyTorch's threads where it is loaded, versions and commit."""
    torch = sys.modules.get("torch")
    threads = {} if torch is None else {"threads": torch.get_num_threads()}
    return {"processor": processor.name(), "cores": len(os.sched_getaffinity(0))} | threads | versions()
