"""What an architecture costs and how good it is: genes (N, G) in, one number for each architecture (N,) out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ofa.space import Genes
    from predictors.accuracy import Accuracy
    from predictors.costs import Macs, Params, WeightBytes
    from predictors.energy import Energy
    from predictors.latency import Latency
    from predictors.latency_table import LatencyTable
    from predictors.learned_latency import LearnedLatency
    from predictors.lut import LutLatency
    from predictors.memory import PeakMemory

_HOMES = {
    "Macs": "costs",
    "Params": "costs",
    "WeightBytes": "costs",
    "PeakMemory": "memory",
    "Accuracy": "accuracy",
    "Latency": "latency",
    "LatencyTable": "latency_table",
    "LutLatency": "lut",
    "LearnedLatency": "learned_latency",
    "Energy": "energy",
}
__all__ = [  # noqa: RUF022
    "Predictor",
    "Macs",
    "Params",
    "WeightBytes",
    "PeakMemory",
    "Accuracy",
    "Latency",
    "LatencyTable",
    "LutLatency",
    "LearnedLatency",
    "Energy",
]


class Predictor(Protocol):
    """What every predictor is: callable on genes, with a name and a unit."""

    @property
    def name(self) -> str:
        """What it predicts: "macs", "latency_ms"."""

    @property
    def unit(self) -> str:
        """Unit of its values."""

    def __call__(self, genes: "Genes") -> "NDArray[Any]":
        """Genes (N, G) to one int64 or float64 each, (N,); raises UserError for genes of another space."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562), so that MACs do not wait for pandas."""
    if name not in _HOMES:
        raise AttributeError(f"module 'predictors' has no attribute {name!r}")
    return getattr(import_module(f"predictors.{_HOMES[name]}"), name)
