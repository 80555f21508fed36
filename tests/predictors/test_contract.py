"""What every predictor keeps: (N, G) in, (N,) out, the same each time, one by one or together, finite."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ofa.errors import UserError
from ofa.space import Space, load_space
from predictors import Accuracy, Latency, LatencyTable, Macs, Params, PeakMemory, Predictor, WeightBytes
from predictors.energy import Energy
from predictors.learned_latency import LearnedLatency
from predictors.lut import LutLatency
from predictors.memory import MODELS as MEMORY_MODELS
from predictors.models import MODELS as ACCURACY_MODELS
from predictors.shapes import space_shapes
from predictors.transfer import TransferredAccuracy
from tests.predictors.lut_tables import write_tables


def _latency(space: Space) -> Predictor:
    timing = {"p10_ms": 0.1, "p90_ms": 0.1, "n": 1}
    times = {shape: timing | {"median_ms": 1e-3 * shape.cin} for shape in space_shapes(space)}
    return Latency(space, LatencyTable({}, times), intercept=0.1)


def _lut(space: Space) -> Predictor:
    with tempfile.TemporaryDirectory() as folder:
        return LutLatency(space, write_tables(Path(folder), space))


def _learned(space: Space, *donors: LearnedLatency) -> LearnedLatency:
    genes = space.sample(60, np.random.default_rng(len(donors)))
    return LearnedLatency(space, donors).fit(genes, 1e-6 * Macs(space)(genes) * genes[:, 3:5].sum(axis=1) + 1)


def _accuracy(model: str) -> Callable[[Space], Predictor]:
    def make(space: Space) -> Predictor:
        genes = space.sample(12, np.random.default_rng(5))
        return Accuracy(space, model).fit(genes, np.log(Macs(space)(genes)))

    return make


def _transferred(space: Space) -> Predictor:
    base, genes = _accuracy("ridge")(space), space.sample(6, np.random.default_rng(6))
    return TransferredAccuracy(space, base).fit(genes, base(genes) - 0.1)


PREDICTORS: dict[str, Callable[[Space], Predictor]] = {
    "macs": Macs,
    "params": Params,
    "weight_bytes": WeightBytes,
    **{f"memory {model}": lambda space, model=model: PeakMemory(space, model) for model in MEMORY_MODELS},  # type: ignore[misc]
    "latency": _latency,
    "latency look-up tables": _lut,
    "latency learned": _learned,
    "latency learned with a donor": lambda space: _learned(space, _learned(space)),
    "energy": Energy,
    "accuracy after int8": _transferred,
    **{f"accuracy {model}": _accuracy(model) for model in ACCURACY_MODELS},
}


@pytest.fixture(scope="module", params=PREDICTORS)
def predictor(request: pytest.FixtureRequest) -> Predictor:
    return PREDICTORS[request.param](SPACE)


SPACE = load_space("digits_mbv3")
GENES = SPACE.sample(64, np.random.default_rng(0))


def test_one_finite_number_for_each_architecture(predictor: Predictor) -> None:
    values = predictor(GENES)
    assert values.shape == (64,)
    assert values.dtype in (np.int64, np.float64)
    assert np.isfinite(values).all()
    assert predictor(GENES[:0]).shape == (0,)
    assert predictor.name
    assert predictor.unit


def test_the_same_answer_each_time_and_the_argument_untouched(predictor: Predictor) -> None:
    given = GENES.copy()
    np.testing.assert_array_equal(predictor(given), predictor(given))
    np.testing.assert_array_equal(given, GENES)


def test_together_is_one_by_one(predictor: Predictor) -> None:
    one_by_one = np.concatenate([predictor(GENES[i : i + 1]) for i in range(len(GENES))])
    float32 = "ofa_mlp" in getattr(predictor, "candidates", ())
    np.testing.assert_allclose(predictor(GENES), one_by_one, rtol=1e-6 if float32 else 1e-10)


def test_equal_networks_cost_the_same(predictor: Predictor) -> None:
    free = (np.random.default_rng(1).random((64, len(SPACE.genes))) * SPACE.counts).astype(np.int8)
    np.testing.assert_array_equal(predictor(free), predictor(SPACE.canonical(free)))


def test_genes_of_another_space_are_refused(predictor: Predictor) -> None:
    with pytest.raises(UserError, match="genes have shape"):
        predictor(GENES[:, :-1])


def test_building_it_twice_gives_the_same_predictor(request: pytest.FixtureRequest, predictor: Predictor) -> None:
    again = PREDICTORS[request.node.callspec.params["predictor"]](SPACE)
    np.testing.assert_array_equal(predictor(GENES), again(GENES))
