"""What many tests of the supernet and of compression use."""

from __future__ import annotations

import pytest
from torch import Tensor

from ofa.data import ImageData, digits
from ofa.space import Space, load_space


@pytest.fixture(scope="session")
def data() -> ImageData:
    return digits()


@pytest.fixture(scope="session")
def space() -> Space:
    return load_space("digits_mbv3")


@pytest.fixture(scope="session")
def images(data: ImageData) -> Tensor:
    return next(data.batches("test", 128, 16, rng=None))[0]
