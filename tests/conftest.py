"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same numbers on every machine; torch is imported after this
settings.register_profile("ofa", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ofa")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real data kept outside the project: OFA_DATA, or ../shared/data; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("OFA_DATA", ROOT.parent / "shared/data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set OFA_DATA to the folder with cifar10/ and tables/")
    return folder
