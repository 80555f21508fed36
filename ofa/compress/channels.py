"""Channel pruning of any network: what makes it faster in every runtime.

A StaticNet stays one (`ofa.compress.prune`); other modules are pruned by torch-pruning, which follows the dependencies
between their layers (extra `prune`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ofa.compress.chain import Work
from ofa.compress.criteria import CRITERIA, Scores, channel_scores, taylor_scores
from ofa.compress.equalize import ChannelCap
from ofa.compress.gating import Gated
from ofa.compress.layers import BYTES, image_of, layer_macs, weight_layers
from ofa.compress.magnitude import finetuned
from ofa.compress.prune import prune_to
from ofa.compress.targets import Target, amount, check_target
from ofa.distill import label_loss
from ofa.errors import UserError
from ofa.extras import extra
from ofa.finetune import Finetuning
from ofa.liveness import peak_elements
from ofa.modules import evaluating
from ofa.static import StaticNet, build_spec

PARTS, HALVINGS = 16, 4  # of the range of ratios that torch-pruning is given, and of one of these
TAYLOR_BATCH = 64


def weight_bytes(net: nn.Module, image: Tensor) -> float:
    """Bytes of the parameters as float32."""
    return BYTES * sum(parameter.numel() for parameter in net.parameters())


def activation_bytes(net: nn.Module, image: Tensor) -> float:
    """Bytes of all float32 activations alive at once, at most, on one image (1, C, R, R)."""
    return BYTES * peak_elements(net, image)


def onnx_latency(net: nn.Module, image: Tensor) -> float:
    """Median milliseconds in ONNX Runtime, one image, one thread."""
    from ofa.export.graph import onnx_model
    from ofa.export.latency import measure_onnx

    model = onnx_model(net, tuple(image.shape[1:])).SerializeToString()  # type: ignore[arg-type]
    return float(measure_onnx(model, repeats=25, seconds=5.0)["median_ms"])


@dataclass(frozen=True, slots=True)
class Channels:
    """Remove channels until every target is met, and fine-tune with the unpruned network as teacher.

    macs, size_bytes (of float32 weights), peak_memory_bytes (of float32 activations, batch 1), latency_ms (by `timer`):
    what to keep, each a share of the network's or an amount ("5M", "250KB", "2ms"; None: no target).  criterion: taylor
    is the loss that removing a channel costs to first order, on `images` validation images (`criteria.taylor_scores`);
    the others are those of `ofa.compress.prune.Pruning`.  multiple: widths are multiples of this.  streams: prune what
    residuals add up in too, not only the middles of blocks (of a StaticNet; torch-pruning always does).  timer:
    milliseconds of a network on an image, by default in ONNX Runtime on this machine.
    """

    macs: Target | None = 0.5
    size_bytes: Target | None = None
    peak_memory_bytes: Target | None = None
    latency_ms: Target | None = None
    criterion: str = "taylor"
    multiple: int = 8
    streams: bool = True
    images: int = 1024
    timer: Callable[[nn.Module, Tensor], float] = onnx_latency
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        known = (*CRITERIA, "taylor")
        if self.criterion not in known:
            raise UserError(f"criterion {self.criterion!r} is not known; choose from {', '.join(known)}")
        if self.multiple < 1 or self.images < 1:
            raise UserError(f"multiple {self.multiple} and images {self.images} must be at least 1; 8 suits runtimes")
        if not self.targets():
            raise UserError("channels has no target; give macs, size_bytes, peak_memory_bytes or latency_ms")
        for name, target in self.targets().items():
            check_target(name, target)

    def __call__(self, net: nn.Module, work: Work) -> nn.Module:
        """A narrower, fine-tuned network in evaluation mode; raises UserError where a target cannot be met.

        So it does where an earlier step changed the network's tensors in a way that pruning cannot follow.
        """
        if changed := _changed(net):
            raise UserError(
                f"an earlier step changed {changed[0]}, which channels cannot narrow; "
                "put channels before the steps that quantize, equalize, gate or make binary"
            )
        small = self._static(net, work) if isinstance(net, StaticNet) else self._traced(net, work)
        return finetuned(small, work, self.finetuning)

    def targets(self) -> dict[str, Target]:
        """The targets that are given."""
        names = ("macs", "size_bytes", "peak_memory_bytes", "latency_ms")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def budget(self, net: nn.Module, image: Tensor) -> Budget:
        """The targets as amounts, beside what they are of."""
        costs: dict[str, Callable[[nn.Module, Tensor], float]] = {
            "macs": lambda net, image: sum(layer_macs(net, image).values()),
            "size_bytes": weight_bytes,
            "peak_memory_bytes": activation_bytes,
            "latency_ms": self.timer,
        }
        limits = {name: amount(name, target, costs[name](net, image)) for name, target in self.targets().items()}
        return Budget(limits, {name: costs[name] for name in limits}, image)

    def scores(self, net: StaticNet, work: Work) -> Scores:
        """Importance of each channel of each group, (C,)."""
        if self.criterion == "taylor":
            return taylor_scores(net, _labelled(work, self.images), streams=self.streams)
        return channel_scores(net, self.criterion, streams=self.streams)

    def _static(self, net: StaticNet, work: Work) -> StaticNet:
        budget, device = self.budget(net, image_of(net, work)), image_of(net, work).device
        small, least = prune_to(
            net, self.scores(net, work), lambda spec: budget.fits(build_spec(spec).to(device).eval()), self.multiple
        )
        if small is None:
            raise budget.unreachable(build_spec(least).to(device).eval(), f"widths of {self.multiple}")
        return small

    def _traced(self, net: nn.Module, work: Work) -> nn.Module:
        """The least share of channels, of all layers together, whose removal by torch-pruning meets the targets.

        It is looked for in `PARTS` steps, then by bisection: a layer that would lose all its channels keeps them, so
        that removing more may leave more.
        """
        budget = self.budget(net, image_of(net, work))
        narrow = partial(self._narrowed, net, image_of(net, work), self._gradients(net, work))
        if budget.fits(net):
            return copy.deepcopy(net)
        least = net
        for part in range(1, PARTS + 1):
            best = narrow(part / PARTS)
            least = min(least, best, key=lambda one: weight_bytes(one, budget.image))
            if budget.fits(best):
                break
        else:
            raise budget.unreachable(least, f"removing channels in multiples of {self.multiple}")
        low, high = (part - 1) / PARTS, part / PARTS
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            trial = narrow(middle)
            if budget.fits(trial):
                high, best = middle, trial
            else:
                low = middle
        return best

    def _narrowed(self, net: nn.Module, image: Tensor, gradients: dict[str, Tensor], ratio: float) -> nn.Module:
        """A copy without that share of the channels."""
        tp = torch_pruning()
        twin = copy.deepcopy(net).eval()
        for name, parameter in twin.named_parameters():
            parameter.grad = gradients.get(name)
        kinds = {
            "l1": partial(tp.importance.GroupMagnitudeImportance, p=1),
            "l2": partial(tp.importance.GroupMagnitudeImportance, p=2),
            "bn_scale": tp.importance.BNScaleImportance,
            "taylor": tp.importance.GroupTaylorImportance,
        }
        if self.criterion not in kinds:
            raise UserError(f"criterion {self.criterion!r} suits a StaticNet alone; choose from {', '.join(kinds)}")
        last = list(weight_layers(twin).values())[-1]
        try:
            pruner = tp.pruner.BasePruner(
                twin,
                image,
                kinds[self.criterion](),
                global_pruning=True,
                pruning_ratio=ratio,
                max_pruning_ratio=max(ratio, 0.9),
                round_to=self.multiple,
                ignored_layers=[last],
            )
            pruner.step()
        except Exception as error:  # of any type, where it follows a network's operators wrongly
            why = f"{type(error).__name__}: {error}"
            raise UserError(f"torch-pruning cannot narrow {type(net).__name__} ({why}); leave channels out") from error
        twin.zero_grad()
        with torch.no_grad(), evaluating(net):
            if twin(image).shape != net(image).shape:
                raise UserError("pruning changed the network's outputs: its last layer must be the classifier")
        return twin.train(net.training)

    def _gradients(self, net: nn.Module, work: Work) -> dict[str, Tensor]:
        """Gradients of the parameters on validation images, for Taylor; else none."""
        if self.criterion != "taylor":
            return {}
        twin = copy.deepcopy(net).eval()
        device = next(twin.parameters()).device
        for x, y in _labelled(work, self.images):
            label_loss(twin(x.to(device)), y.to(device)).backward()
        return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


@dataclass(frozen=True, slots=True)
class Budget:
    """What a network may cost, and how each cost is found."""

    limits: dict[str, float]
    costs: dict[str, Callable[[nn.Module, Tensor], float]]
    image: Tensor

    def fits(self, net: nn.Module) -> bool:
        """Whether every cost is within its limit."""
        return all(self.costs[name](net, self.image) <= limit for name, limit in self.limits.items())

    def unreachable(self, net: nn.Module, why: str) -> UserError:
        """The error that the narrowest network is still too large."""
        found = {name: self.costs[name](net, self.image) for name in self.limits}
        over = [
            f"{name} {found[name]:.6g} of {limit:.6g}" for name, limit in self.limits.items() if found[name] > limit
        ]
        return UserError(f"{'; '.join(over)} cannot be met: that is what {why} leaves; raise it, or lower multiple")


def _changed(net: nn.Module) -> list[str]:
    """Tensors that a spec's network has and this one has not, or the reverse; of other modules, parts of one width."""
    if isinstance(net, StaticNet):
        return sorted(set(net.state_dict()).symmetric_difference(build_spec(net.spec).state_dict()))
    fixed = (Gated, ChannelCap)
    return [name for name, m in net.named_modules() if isinstance(m, fixed) or hasattr(m, "weight_scale")]


def torch_pruning() -> Any:
    """The package torch-pruning; raises UserError that names the extra where it is not installed."""
    return extra("torch_pruning", "prune")


def _labelled(work: Work, images: int) -> Any:
    return work.data.batches("val", TAYLOR_BATCH, work.resolution, rng=None, limit=images)
