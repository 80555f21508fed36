"""The files that training leaves: a supernet's last weights, and their moving average."""

from __future__ import annotations

from pathlib import Path

from ofa.errors import UserError
from ofa.space import Space
from ofa.supernet import Supernet
from ofa.training.checkpoint import read_checkpoint
from ofa.weights import load_tensors, load_weights

SUPERNET, AVERAGE = "supernet.safetensors", "average.safetensors"
WEIGHTS = {"last": SUPERNET, "average": AVERAGE}  # which of a run's weights a later stage uses


def start_from(supernet: Supernet, path: str | Path) -> None:
    """Load the weights of a supernet file, or of a checkpoint of its training (a file, or its folder), in place.

    A first or last layer whose shape differs (other channels or classes) keeps its fresh weights; raises UserError for
    any other difference.
    """
    found = read_checkpoint(Path(path)) if Path(path).is_dir() else load_tensors(path)
    if found is None:
        raise UserError(
            f"{path} holds no checkpoint; give a supernet.safetensors, or a folder such as <run>/train/good"
        )
    own, weights = supernet.state_dict(), "weights."
    tensors = {n.removeprefix(weights): t for n, t in found[0].items() if n.startswith(weights)} or found[0]
    ends = ("units.0.", f"units.{len(supernet.units) - 1}.")
    fresh = {n: own[n] for n, t in tensors.items() if n in own and n.startswith(ends) and t.shape != own[n].shape}
    load_weights(supernet, tensors | fresh, path)


def load_supernet(folder: Path, space: Space, *, weights: str = "last") -> Supernet:
    """The trained supernet of a training folder, in evaluation mode; weights: the "last" ones, or their "average"."""
    if weights not in WEIGHTS:
        raise UserError(f"weights {weights!r} are not known; choose from {', '.join(WEIGHTS)}")
    supernet = Supernet(space)
    path = folder / WEIGHTS[weights]
    if weights == "average" and not path.exists():
        raise UserError(f"{path} does not exist; train with train.average=0.999, or use the last weights")
    load_weights(supernet, load_tensors(path)[0], path)
    return supernet.eval()
