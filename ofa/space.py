"""The search space: which networks a supernet holds, as genes (arrays, for search) and as Arch (values, for people).

N architectures, G genes.  Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.spec import ACTIVATIONS, KINDS

Genes = NDArray[np.int8]
DIMENSIONS = ("resolution", "width", "depth", "kernel", "expand")


@dataclass(frozen=True, slots=True)
class Arch:
    """One architecture in values: image side in pixels, width, blocks of each stage, kernel and expand of each block.

    `kernel` and `expand` hold either the active blocks alone (sum of `depth` entries, as `Space.decode` writes them) or
    one entry for every block of the supernet (as once-for-all does; those of skipped blocks are ignored).
    """

    resolution: int
    depth: tuple[int, ...]
    kernel: tuple[int, ...]
    expand: tuple[float, ...]
    width: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("depth", "kernel", "expand", "width"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, (list, tuple)) else (value,))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Arch:
        """From `to_dict`; raises UserError for unknown or missing fields."""
        names = [field.name for field in fields(Arch)]
        if set(values) - set(names) or set(names) - {"width"} - set(values):
            raise UserError(f"an architecture has the fields {names}, not {sorted(values)}")
        return Arch(**dict(values))


@dataclass(frozen=True, slots=True)
class Gene:
    """One choice: its name ("kernel.1.0" is the kernel of block 0 in stage 1) and its values in ascending order."""

    name: str
    choices: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A fixed unit before or after the stages; `channels` is scaled by the width multiplier (0: the classes)."""

    kind: str
    channels: int = 0
    kernel: int = 1
    stride: int = 1
    expand: float = 1
    act: str = "none"
    se: bool = False
    bn: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.act not in ACTIVATIONS:
            raise UserError(
                f"layer {self.kind!r} with activation {self.act!r} is not known; "
                f"kinds: {', '.join(KINDS)}; activations: {', '.join(ACTIVATIONS)}"
            )


@dataclass(frozen=True, slots=True)
class Stage:
    """Elastic blocks of one width: the first has the stride, `depth` says how many of them are kept."""

    channels: int
    stride: int
    depth: tuple[int, ...]
    kernel: tuple[int, ...]
    expand: tuple[float, ...]
    act: str = "relu"
    se: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "kernel", "expand"):
            object.__setattr__(self, name, _choices(name, getattr(self, name)))
        if self.depth[0] < 1:
            raise UserError(f"depth {self.depth[0]} leaves a stage without a block; depths start at 1")
        if any(kernel % 2 == 0 for kernel in self.kernel):
            raise UserError(f"kernels {self.kernel} must all be odd")


@dataclass(frozen=True)
class Space:
    """A family of networks: fixed stem and head, elastic stages, image resolutions and width multipliers.

    genes: resolution, width, a depth for each stage, a kernel for each block, an expand ratio for each block.  Genes of
    skipped blocks are 0 (canonical), so equal networks have equal genes.
    """

    name: str
    resolution: tuple[int, ...]
    stages: tuple[Stage, ...]
    stem: tuple[Layer, ...]
    head: tuple[Layer, ...]
    width: tuple[float, ...] = (1.0,)
    in_channels: int = 3
    classes: int = 1000

    def __post_init__(self) -> None:
        for name in ("resolution", "width"):
            object.__setattr__(self, name, _choices(name, getattr(self, name)))
        for name, kind in (("stages", Stage), ("stem", Layer), ("head", Layer)):
            records = tuple(r if isinstance(r, kind) else record(kind, r) for r in getattr(self, name))
            object.__setattr__(self, name, records)

    # -- genes -------------------------------------------------------------------------------------------------------

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """The table of genes, in column order."""
        blocks = [(s, b, stage) for s, stage in enumerate(self.stages) for b in range(stage.depth[-1])]
        return (
            Gene("resolution", self.resolution),
            Gene("width.0", self.width),
            *(Gene(f"depth.{s}", stage.depth) for s, stage in enumerate(self.stages)),
            *(Gene(f"kernel.{s}.{b}", stage.kernel) for s, b, stage in blocks),
            *(Gene(f"expand.{s}.{b}", stage.expand) for s, b, stage in blocks),
        )

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Choices of each gene, (G,)."""
        return np.array([len(gene.choices) for gene in self.genes])

    @cached_property
    def blocks(self) -> NDArray[np.int64]:
        """Stage and position in it of every elastic block, (B, 2)."""
        return np.array([(s, b) for s, stage in enumerate(self.stages) for b in range(stage.depth[-1])])

    @cached_property
    def size(self) -> int:
        """How many distinct networks the space holds."""
        stages = [
            sum((len(stage.kernel) * len(stage.expand)) ** depth for depth in stage.depth) for stage in self.stages
        ]
        return len(self.resolution) * len(self.width) * math.prod(stages)

    def columns(self, dimension: str) -> slice:
        """Columns of the genes of one dimension ("resolution", "width", "depth", "kernel", "expand")."""
        stages, blocks = len(self.stages), len(self.blocks)
        ends = np.cumsum([0, 1, 1, stages, blocks, blocks])
        at = DIMENSIONS.index(dimension)
        return slice(int(ends[at]), int(ends[at + 1]))

    @cached_property
    def _values(self) -> NDArray[np.float64]:
        table = np.full((len(self.genes), int(self.counts.max())), np.nan)
        for row, gene in zip(table, self.genes, strict=True):
            row[: len(gene.choices)] = gene.choices
        return table

    def values(self, genes: Genes, dimension: str) -> NDArray[np.float64]:
        """Values that the genes of one dimension choose: (N, columns of it)."""
        columns = np.arange(len(self.genes))[self.columns(dimension)]
        return self._values[columns, genes[:, columns]]

    def active(self, genes: Genes) -> NDArray[np.bool_]:
        """Which genes matter, (N, G): those of a block beyond its stage's depth do not."""
        depth = self.values(genes, "depth")[:, self.blocks[:, 0]]
        used = self.blocks[:, 1] < depth
        always = np.ones((len(genes), 2 + len(self.stages)), dtype=bool)
        return np.concatenate([always, used, used], axis=1)

    def canonical(self, genes: Genes) -> Genes:
        """The same networks with the genes of skipped blocks set to 0: (N, G)."""
        return np.where(self.active(genes), genes, 0).astype(np.int8)

    def validate(self, genes: Genes) -> None:
        """Raise UserError where `genes` is not an (N, G) array of choices of this space."""
        genes = np.asarray(genes)
        if genes.ndim != 2 or genes.shape[1] != len(self.genes):
            raise UserError(f"genes have shape {genes.shape}; {self.name} needs (N, {len(self.genes)})")
        wrong = np.argwhere((genes < 0) | (genes >= self.counts))
        if len(wrong):
            row, column = wrong[0]
            gene = self.genes[column]
            raise UserError(
                f"gene {gene.name} of row {row} is {genes[row, column]}; it must be 0 to {len(gene.choices) - 1}"
            )

    def sample(self, n: int, rng: np.random.Generator) -> Genes:
        """Draw n architectures, every gene uniformly: canonical genes (n, G)."""
        return self.canonical((rng.random((n, len(self.genes))) * self.counts).astype(np.int8))

    def largest(self) -> Genes:
        """The architecture with the last choice of every gene, (1, G)."""
        return self.canonical((self.counts - 1).astype(np.int8)[None])

    def smallest(self) -> Genes:
        """The architecture with the first choice of every gene, (1, G)."""
        return np.zeros((1, len(self.genes)), dtype=np.int8)

    def onehot(self, genes: Genes) -> NDArray[np.float32]:
        """One-hot features (N, sum of choices); all columns of a skipped block's genes are 0."""
        columns = np.repeat(np.arange(len(self.genes)), self.counts)
        choices = np.concatenate([np.arange(count) for count in self.counts])
        masked = np.where(self.active(genes), genes, -1)
        return (masked[:, columns] == choices).astype(np.float32)

    # -- values ------------------------------------------------------------------------------------------------------

    def encode(self, archs: Sequence[Arch]) -> Genes:
        """Genes of architectures, (N, G) canonical; raises UserError for a value that is not in this space."""
        genes = np.zeros((len(archs), len(self.genes)), dtype=np.int8)
        for row, arch in zip(genes, archs, strict=True):
            if len(arch.depth) != len(self.stages):
                raise UserError(f"depth {arch.depth} has {len(arch.depth)} entries; {self.name} has {len(self.stages)}")
            for column, value in enumerate((arch.resolution, arch.width[0], *arch.depth)):
                row[column] = self._index(column, value)
            for column, value in self._block_values(arch):
                row[column] = self._index(column, value)
        return self.canonical(genes)

    def decode(self, genes: Genes) -> list[Arch]:
        """Architectures of genes, with the kernels and expand ratios of active blocks alone."""
        self.validate(genes)
        table = np.concatenate([self.values(genes, dimension) for dimension in DIMENSIONS], axis=1)
        return [self._arch(values, used) for values, used in zip(table, self.active(genes), strict=True)]

    def _arch(self, values: NDArray[np.float64], used: NDArray[np.bool_]) -> Arch:
        picked: dict[str, Any] = {}
        for dimension in DIMENSIONS:
            columns = self.columns(dimension)
            picked[dimension] = tuple(_number(v) for v in values[columns][used[columns]])
        return Arch(int(picked["resolution"][0]), picked["depth"], picked["kernel"], picked["expand"], picked["width"])

    def _block_values(self, arch: Arch) -> list[tuple[int, float]]:
        """Pairs (column, value) of the kernels and expand ratios of active blocks."""
        pairs: list[tuple[int, float]] = []
        kept = [i for i, (s, b) in enumerate(self.blocks) if b < arch.depth[s]]
        for dimension, given in (("kernel", arch.kernel), ("expand", arch.expand)):
            first = self.columns(dimension).start
            if len(given) == len(self.blocks):
                pairs += [(first + i, given[i]) for i in kept]
            elif len(given) == len(kept):
                pairs += [(first + i, value) for i, value in zip(kept, given, strict=True)]
            else:
                raise UserError(
                    f"{dimension} has {len(given)} entries; give one for each of the {len(kept)} active blocks "
                    f"(sum of depth) or for each of the {len(self.blocks)} blocks of {self.name}"
                )
        return pairs

    def _index(self, column: int, value: float) -> int:
        gene = self.genes[column]
        try:
            return gene.choices.index(value)
        except ValueError:
            dimension = gene.name.split(".")[0]
            raise UserError(
                f"{dimension} {value} ({gene.name}) is not in space {self.name}; choose from {gene.choices}"
            ) from None

    # -- other spaces ------------------------------------------------------------------------------------------------

    def restrict(self, **choices: int | Sequence[float]) -> Space:
        """A smaller space: each dimension keeps its n largest choices (an int) or the listed values.

        `space.restrict(kernel=1, depth=2)` keeps the largest kernel and the two largest depths.
        """
        unknown = set(choices) - set(DIMENSIONS)
        if unknown:
            raise UserError(f"dimension {sorted(unknown)} is not known; choose from {', '.join(DIMENSIONS)}")
        own: dict[str, Any] = {
            name: _keep(name, getattr(self, name), choices.get(name)) for name in ("resolution", "width")
        }
        return replace(self, stages=tuple(_kept_stage(stage, choices) for stage in self.stages), **own)

    def adapt(self, *, in_channels: int, classes: int) -> Space:
        """The same space for images of `in_channels` channels in `classes` classes."""
        return replace(self, in_channels=in_channels, classes=classes)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `load_space` reads it."""
        return asdict(self)


def load_space(space: str | Mapping[str, Any]) -> Space:
    """A Space by the name of its file in conf/space, or from the dict that `Space.to_dict` or such a file gives."""
    if isinstance(space, str):
        space = _read_yaml(space)
    return record(Space, {key: value for key, value in space.items() if key != "_target_"})


def _read_yaml(name: str) -> dict[str, Any]:
    import yaml

    folder = files("conf") / "space"
    known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name not in known:
        raise UserError(f"space {name!r} is not known; choose from {', '.join(known)}")
    return yaml.safe_load((folder / f"{name}.yaml").read_text())


def record(kind: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from a mapping, such as a record of a YAML file; raises UserError for unknown or missing fields."""
    known = [field.name for field in fields(kind)]
    if unknown := set(values) - set(known):
        raise UserError(f"{kind.__name__.lower()} field {sorted(unknown)} is not known; choose from {known}")
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"a {kind.__name__.lower()} record lacks a field: {error}") from None


def _choices(name: str, values: Any) -> tuple[float, ...]:
    values = tuple(values) if isinstance(values, (Sequence, np.ndarray)) else (values,)
    if not values or list(values) != sorted(set(values)) or len(values) > 127:
        raise UserError(f"{name} {values} must be 1 to 127 different values in ascending order")
    return values


def _keep(name: str, values: tuple[float, ...], wanted: int | Sequence[float] | None) -> tuple[float, ...]:
    if wanted is None:
        return values
    if isinstance(wanted, int):
        if wanted < 1:
            raise UserError(f"{name}={wanted} keeps no choice; keep at least 1")
        return values[-wanted:]
    kept = tuple(value for value in values if value in set(wanted))
    if not kept:
        raise UserError(f"{name} {list(wanted)} leaves none of the choices {values}")
    return kept


def _kept_stage(stage: Stage, choices: Mapping[str, int | Sequence[float]]) -> Stage:
    kept: dict[str, Any] = {name: _keep(name, getattr(stage, name), choices.get(name)) for name in DIMENSIONS[2:]}
    return replace(stage, **kept)


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() and not isinstance(value, int) else float(value)
