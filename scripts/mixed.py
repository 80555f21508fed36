"""Bits of each layer chosen by search under limits, as one step of compression (HAQ: Wang et al. 2019; APQ: 2020).

The agents of `search/` propose bits; noise measured layer by layer stands for the loss of accuracy; the best few are
quantized for real, and the most accurate one is kept.  It joins `search`, `predictors` and `ofa`, so it lives here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ofa.compress.chain import Work
from ofa.compress.fold import fold_batch_norms
from ofa.compress.kmeans import check_bits
from ofa.compress.layers import device_of, image_of, layer_macs, weight_layers
from ofa.compress.linear import BATCH, Linear, quantize_linear
from ofa.compress.noise import layer_noise
from ofa.compress.packed import bytes_beside
from ofa.errors import UserError
from ofa.evaluate import accuracy
from ofa.files import read_json
from predictors.layer_bits import LayerSum, bits_space, chosen_bits
from search.evolution import Evolution
from search.feasible import InfeasibleError
from search.limits import parse_limits, show
from search.loop import run_search
from search.problem import Problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mixed:
    """Search bits for each layer's weights and inputs, then quantize with the best.

    limits: at most so much of weight_bytes, bit_operations or, with `latency`, latency_ms, such as {weight_bytes:
    "100KB"}; weight_bytes are those of the packed file before Huffman coding, which makes it smaller.
    weight_choices, input_choices: bits to choose from.  latency: a JSON file of milliseconds of each layer,
    {"layer": {"8x8": 0.02}}, weight bits x input bits.  quantization: everything else about the quantization;
    its `finetuning` is for the chosen bits alone.  images: calibration images for the noise and the ranges.
    agent: made with `space` and `seed`.  evaluations: of the search.  verify: how many of the best are
    quantized and measured on `verify_images` validation images.
    """

    limits: Mapping[str, float | str]
    weight_choices: tuple[int, ...] = (2, 3, 4, 6, 8)
    input_choices: tuple[int, ...] = (4, 6, 8)
    latency: str | None = None
    quantization: Linear = field(default_factory=lambda: Linear(calibration="mse", weight_range="mse"))
    images: int = 256
    agent: Callable[..., Any] = Evolution
    evaluations: int = 5000
    verify: int = 5
    verify_images: int | None = 1000

    def __post_init__(self) -> None:
        for name in ("weight_choices", "input_choices"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, int) else tuple(given))
            for bits in getattr(self, name):
                check_bits(bits, 2, 8)
        if not self.limits:
            raise UserError(
                "mixed precision needs a limit, such as limits={weight_bytes: 100KB}; without one, use int8"
            )
        if self.verify < 1 or self.evaluations < 1:
            raise UserError(f"verify {self.verify} and evaluations {self.evaluations} must be at least 1")

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """The network quantized with the bits found; raises UserError where no choice meets the limits."""
        found = [replace(self.quantization, layers=w, inputs=i) for w, i in self.search(net, work)]
        measured = [replace(settings, finetuning=None)(net, work) for settings in found]
        scores = [
            accuracy(made, work.data, "val", resolution=work.resolution, limit=self.verify_images) for made in measured
        ]
        best = int(np.argmax(scores))
        logger.info("validation accuracy of the %d best by noise: %s", len(scores), scores)
        return measured[best] if self.quantization.finetuning is None else found[best](net, work)

    def search(self, net: nn.Module, work: Work) -> list[tuple[dict[str, int], dict[str, int]]]:
        """The `verify` choices of least noise within the limits: bits of weights, and of inputs, by layer."""
        folded = fold_batch_norms(net)
        names = list(weight_layers(folded))
        space = bits_space(len(names), self.weight_choices, self.input_choices)
        problem = self.problem(folded, work)
        agent = self.agent(space=space, seed=work.seed)
        if hasattr(agent, "violation"):
            agent.violation = problem.exceeds
        try:
            result = run_search(agent, problem, self.evaluations, batch=100)
        except InfeasibleError as error:
            limits = " and ".join(map(problem.limit, error.binding))
            raise UserError(f"no choice of bits meets {limits}; raise a limit or allow other bits") from None
        feasible = np.flatnonzero(result.evaluations["violation"].to_numpy() <= 0)
        best = feasible[np.argsort(result.cost[feasible, 0], kind="stable")[: self.verify]]
        weights, inputs = chosen_bits(space, result.genes[best], (self.weight_choices, self.input_choices))
        pairs = zip(weights.tolist(), inputs.tolist(), strict=True)
        return [(dict(zip(names, w, strict=True)), dict(zip(names, i, strict=True))) for w, i in pairs]

    def problem(self, net: nn.Module, work: Work) -> Problem:
        """Least noise under the limits, for a network whose batch norm is folded.

        Raises UserError, before the noise is measured, where not even the fewest bits meet a limit.
        """
        layers, macs = weight_layers(net), layer_macs(net, image_of(net, work))
        space = bits_space(len(layers), self.weight_choices, self.input_choices)
        images = work.data.calibration("val", self.images, work.resolution, batch_size=BATCH)
        batches = [x.to(device_of(net)) for x in images]
        w, i = np.array(self.weight_choices)[None, :, None], np.array(self.input_choices)[None, None, :]
        sizes = np.array([layer.weight.numel() for layer in layers.values()])[:, None, None]
        work_of = np.array([macs[name] for name in layers])[:, None, None]
        costs = [
            LayerSum("weight_bytes", "bytes", space, np.ceil(sizes * w / 8), self._other_bytes(net, work, batches[:1])),
            LayerSum("bit_operations", "bit-operations", space, (work_of * w * i).astype(float)),
        ]
        if self.latency is not None:
            costs.append(LayerSum("latency_ms", "ms", space, self._latencies(list(layers))))
        bounds = parse_limits(self.limits, ["noise", *(cost.name for cost in costs)])
        for cost in costs:
            self._check_reach(cost, bounds.get(cost.name, np.inf))
        weights, inputs = layer_noise(net, self.quantization, self.weight_choices, self.input_choices, batches)
        noise = LayerSum("noise", "share of the signal", space, weights[:, :, None] + inputs[:, None, :])
        return Problem({cost.name: cost for cost in (noise, *costs)}, {"noise": 1}, self.limits)

    def _other_bytes(self, net: nn.Module, work: Work, batches: Sequence[Tensor]) -> int:
        """The most bytes of the packed file that are no weights: biases, scales, grids of the inputs, the header."""
        weight, inputs = self.weight_choices[0], self.input_choices[0]
        quick = replace(self.quantization, layers={}, inputs={}, weight_bits=weight, activation_bits=inputs)
        made = quantize_linear(net, replace(quick, calibration="minmax", rounding="nearest"), batches)
        weights = {f"{name}.weight" for name in weight_layers(made)}
        return bytes_beside(made.state_dict(), weights, {"step": "mixed", "resolution": work.resolution})

    def _check_reach(self, cost: LayerSum, most: float) -> None:
        if cost.least > most:
            raise UserError(
                f"no choice of bits meets {cost.name} <= {show(most)}: the least that weight_choices "
                f"{self.weight_choices} and input_choices {self.input_choices} reach is {show(cost.least)}; "
                "raise the limit or allow fewer bits"
            )

    def _latencies(self, names: list[str]) -> np.ndarray:
        table = read_json(str(self.latency))
        keys = [[f"{w}x{i}" for i in self.input_choices] for w in self.weight_choices]
        try:
            return np.array([[[float(table[name][key]) for key in row] for row in keys] for name in names])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.latency} lacks {error}; it needs milliseconds of {keys[0][0]} and so on") from None
