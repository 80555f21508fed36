"""What benchmarks share: where and with what they ran, spaces by name or file, mistakes in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ofa import processor
from ofa.errors import UserError
from ofa.files import versions
from ofa.space import Space, load_space


def about() -> dict[str, Any]:
    """Processor, cores of this process, PyTorch's threads where it is loaded, versions and commit."""
    torch = sys.modules.get("torch")
    threads = {} if torch is None else {"threads": torch.get_num_threads()}
    return {"processor": processor.name(), "cores": len(os.sched_getaffinity(0))} | threads | versions()


def space_of(name: str) -> Space:
    """A space by its name, or of a YAML file."""
    return load_space(Path(name) if name.endswith((".yaml", ".yml")) else name)


def run_main(main: Callable[[], None]) -> None:
    """Call it, and answer a mistake in one line."""
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
