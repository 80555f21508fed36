"""The search space: which networks a supernet holds, as genes (arrays, for search) and as Arch (values, for people).

N architectures, G genes.  Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from importlib.resources import files
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofa.arrays import python
from ofa.blocks import BLOCKS
from ofa.errors import UserError
from ofa.kinds import check_fields
from ofa.records import OF_BLOCKS, Layer, Stage, check_least, choices_of, kept_choices, kept_stage, record, records

Genes = NDArray[np.int8]
SPACE = "ofa.space.Space"  # what its YAML files name as their _target_
ELASTIC = "_d234_e346_k357"  # of once-for-all's names
DIMENSIONS = ("resolution", "width", "depth", "kernel", "expand", "op")


@dataclass(frozen=True, slots=True)
class Arch:
    """One architecture in values: image side in pixels, width, depth of each stage, choices of each block.

    `kernel`, `expand` and `op` hold either the active blocks alone (as `Space.decode` writes them) or one entry for
    every block of the supernet (as once-for-all does; those of skipped blocks are ignored); what a space does not let
    one choose stays empty.  `depth`: one for each stage that chooses it, or for every stage (those of others are
    ignored).  `width`: one multiplier, or one for each width that the space can choose.
    """

    resolution: int
    depth: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    expand: tuple[float, ...] = ()
    width: tuple[float, ...] = (1.0,)
    op: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        side = python(self.resolution)
        object.__setattr__(self, "resolution", _number(side) if isinstance(side, float) else side)
        for name in ("depth", "width", *OF_BLOCKS):
            value = python(getattr(self, name))
            object.__setattr__(self, name, tuple(map(python, value)) if isinstance(value, (list, tuple)) else (value,))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Arch:
        """From `to_dict`; raises UserError for unknown fields or where the resolution is missing."""
        names = [field.name for field in fields(Arch)]
        if not isinstance(values, Mapping) or set(values) - set(names) or "resolution" not in values:
            given = sorted(values) if isinstance(values, Mapping) else values
            raise UserError(f"an architecture has the fields {names}, resolution among them, not {given}")
        return Arch(**dict(values))


@dataclass(frozen=True, slots=True)
class Gene:
    """One choice: its name ("kernel.1.0" is the kernel of block 0 in stage 1) and its values in ascending order."""

    name: str
    choices: tuple[float, ...]


@dataclass(frozen=True)
class Space:
    """A family of networks: fixed stem and head, elastic stages, image resolutions and width multipliers.

    genes: resolution, width multipliers, a depth for each stage, then kernel, expand ratio and operation of each block,
    as far as there is a choice.  Genes of skipped blocks are 0 (canonical), so equal networks have equal genes.
    bn_eps: what batch norm adds to the variance.
    """

    name: str
    resolution: tuple[int, ...]
    stages: tuple[Stage, ...]
    stem: tuple[Layer, ...]
    head: tuple[Layer, ...]
    width: tuple[float, ...] = (1.0,)
    in_channels: int = 3
    classes: int = 1000
    bn_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("resolution", "width"):
            object.__setattr__(self, name, choices_of(name, getattr(self, name)))
        for name, kind in (("stages", Stage), ("stem", Layer), ("head", Layer)):
            object.__setattr__(self, name, records(kind, name, getattr(self, name)))
        self._check_numbers()
        self._check_chain()

    def _check_numbers(self) -> None:
        """Raise UserError for sizes and widths that no network has, and for fixed layers that cannot be built."""
        check_least(self, {"resolution": 1, "in_channels": 1, "classes": 1}, above_0=("width", "bn_eps"))
        for layer in self._fixed:
            if layer.kind in BLOCKS and not layer.channels:
                raise UserError(f"layer {layer.kind} has no channels; give channels=1 or more")
            if layer.kind == "skip":
                raise UserError("layer skip does nothing where it cannot be chosen; leave it out, or give it in ops")
        kinds = [layer.kind for layer in self.head]
        if "linear" in kinds and "pool" not in kinds[: kinds.index("linear")]:
            raise UserError(f"head {kinds} has no pool in front of its linear layer; give {{kind: pool}} there")
        used = {layer.width for layer in self._fixed if layer.kind in BLOCKS} | {stage.width for stage in self.stages}
        if len(self.width) > 1 and (idle := set(range(self.widths)) - used):
            raise UserError(f"width multiplier {min(idle)} scales nothing; number them 0, 1, 2, ... without a gap")
        if [layer.kind for layer in self._fixed].count("linear") > kinds[-1:].count("linear"):
            raise UserError("a linear layer is the classifier; give one, as the last layer of the head")

    @cached_property
    def _chain(self) -> list[tuple[str, Layer | Stage]]:
        """Fixed layers and stages from the image to the classes, by name."""
        chain: list[tuple[str, Layer | Stage]] = [(f"stem.{i}", layer) for i, layer in enumerate(self.stem)]
        for s, stage in enumerate(self.stages):
            chain += [(f"stages.{s}.before.{i}", layer) for i, layer in enumerate(stage.before)]
            chain.append((f"stage {s}", stage))
        return chain + [(f"head.{i}", layer) for i, layer in enumerate(self.head)]

    @property
    def _fixed(self) -> list[Layer]:
        """Fixed layers: of the stem, in front of stages, and of the head."""
        return [part for _, part in self._chain if isinstance(part, Layer)]

    def _check_chain(self) -> None:
        """Raise UserError for a stage that may be left out, but whose channels are not those it gets.

        The same for width multipliers in a row that look-up tables of costs cannot tell apart.
        """
        channels: int = self.in_channels
        width: int | None = None
        for place, part in self._chain:
            if not part.channels:
                continue
            if isinstance(part, Stage) and part.blocks[0] == 0 and (part.channels, part.width) != (channels, width):
                raise UserError(
                    f"{place} may keep no block, but makes {part.channels} channels of {channels}; keep at least 1"
                )
            pair = {width, part.width} - {None}
            if len(self.width) > 1 and len(pair) > len({w % 2 for w in pair if w is not None}):
                raise UserError(
                    f"{place} lies between width multipliers {width} and {part.width}; of two in a row one must be "
                    "even and one odd, as 0, 1, 2 from stem to head, or the width of one null: its channels stay"
                )
            channels, width = part.channels, part.width

    # -- genes -------------------------------------------------------------------------------------------------------

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """The table of genes, in column order."""
        return (
            Gene("resolution", self.resolution),
            *(Gene(f"width.{i}", self.width) for i in range(self.widths)),
            *(Gene(f"depth.{s}", stage.choices("depth")) for s, stage in self._choosing),
            *(
                Gene(f"{name}.{s}.{b}", self.stages[s].choices(name))
                for name in OF_BLOCKS
                for s, b in self.blocks[self._own[name]]
            ),
        )

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Choices of each gene, (G,)."""
        return np.array([len(gene.choices) for gene in self.genes])

    @cached_property
    def widths(self) -> int:
        """How many width multipliers an architecture chooses."""
        widths = [part.width for _, part in self._chain]
        return 1 + max((width for width in widths if width is not None), default=0)

    @cached_property
    def blocks(self) -> NDArray[np.int64]:
        """Stage and position in it of every elastic block, (B, 2)."""
        pairs = [(s, b) for s, stage in enumerate(self.stages) for b in range(stage.blocks[-1])]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)

    @cached_property
    def _choosing(self) -> list[tuple[int, Stage]]:
        """Stages that choose their depth, with their positions."""
        return [(s, stage) for s, stage in enumerate(self.stages) if stage.chooses("depth")]

    @cached_property
    def _own(self) -> dict[str, NDArray[np.int64]]:
        """Blocks that have a gene of each dimension."""
        return {
            name: np.array([i for i, (s, _) in enumerate(self.blocks) if self.stages[s].chooses(name)], dtype=np.int64)
            for name in OF_BLOCKS
        }

    @cached_property
    def size(self) -> int:
        """How many distinct networks the space holds."""
        forms = [math.prod(len(s.choices(name)) for name in OF_BLOCKS if s.chooses(name)) for s in self.stages]
        stages = [sum(n**kept for kept in s.blocks) for n, s in zip(forms, self.stages, strict=True)]
        return len(self.resolution) * len(self.width) ** self.widths * math.prod(stages)

    def columns(self, dimension: str) -> slice:
        """Columns of the genes of one dimension ("resolution", "width", "depth", "kernel", "expand", "op")."""
        return self._columns[dimension]

    @cached_property
    def _columns(self) -> dict[str, slice]:
        sizes = [1, self.widths, len(self._choosing), *(len(self._own[name]) for name in OF_BLOCKS)]
        ends = np.cumsum([0, *sizes]).tolist()
        return {name: slice(*pair) for name, pair in zip(DIMENSIONS, pairwise(ends), strict=True)}

    @cached_property
    def _values(self) -> NDArray[np.float64]:
        table = np.full((len(self.genes), int(self.counts.max())), np.nan)
        for row, gene in zip(table, self.genes, strict=True):
            row[: len(gene.choices)] = gene.choices
        return table

    @cached_property
    def _numbers(self) -> list[tuple[float, ...]]:
        """The choices of each gene as an architecture has them."""
        return [tuple(map(_number, gene.choices)) for gene in self.genes]

    def values(self, genes: Genes, dimension: str) -> NDArray[np.float64]:
        """Values that the genes of one dimension choose: (N, columns of it)."""
        own = self.columns(dimension)
        return self._values[np.arange(own.start, own.stop), genes[:, own]]

    def block_values(self, genes: Genes, dimension: str) -> NDArray[np.float64]:
        """Kernel, expand ratio or operation of every block, chosen or fixed: (N, B).

        A block that chooses its operation has the operation's, 0 for "skip"; an operation that nobody chooses is -1.
        """
        fixed = [choices[0] for choices in self.block_choices(dimension)]
        values = np.repeat(np.array([fixed], dtype=np.float64), len(genes), axis=0)
        values[:, self._own[dimension]] = self.values(genes, dimension)
        if dimension != "op":
            for column, block in zip(genes[:, self.columns("op")].T, self._own["op"], strict=True):
                values[:, block] = np.array(self.block_choices(dimension)[block])[column]
        return values

    def block_choices(self, dimension: str) -> list[tuple[float, ...]]:
        """What each block's kernel, expand ratio or operation can be, in the order of `blocks`."""
        found = []
        for stage in (self.stages[s] for s, _ in self.blocks):
            if stage.ops and dimension != "op":
                chosen = [stage.ops[int(op)] for op in stage.op]
                found.append(tuple(0.0 if op.kind == "skip" else float(getattr(op, dimension)) for op in chosen))
            else:
                found.append(stage.choices(dimension) or (-1,))
        return found

    def depths(self, genes: Genes) -> NDArray[np.int64]:
        """How many blocks each stage keeps, (N, stages)."""
        kept = np.array([[stage.blocks[-1] for stage in self.stages]], dtype=np.int64).repeat(len(genes), axis=0)
        for column, (s, stage) in zip(genes[:, self.columns("depth")].T, self._choosing, strict=True):
            kept[:, s] = np.array(stage.blocks)[column]
        return kept

    def used(self, genes: Genes) -> NDArray[np.bool_]:
        """Which blocks an architecture keeps, (N, B)."""
        return self.blocks[:, 1] < self.depths(genes)[:, self.blocks[:, 0]]

    def active(self, genes: Genes) -> NDArray[np.bool_]:
        """Which genes matter, (N, G): those of a block beyond its stage's depth do not."""
        depth, least = self._needs
        return np.asarray(genes).take(depth, axis=1) >= least

    @cached_property
    def _needs(self) -> tuple[NDArray[np.int64], Genes]:
        """The column that decides whether a gene matters, and the least choice there with which it does, (G,) each."""
        depth, least = np.zeros(len(self.genes), dtype=np.int64), np.zeros(len(self.genes), dtype=np.int8)
        columns = {s: self.columns("depth").start + at for at, (s, _) in enumerate(self._choosing)}
        for name in OF_BLOCKS:
            for gene, (s, b) in enumerate(self.blocks[self._own[name]], start=self.columns(name).start):
                if s in columns:
                    depth[gene], least[gene] = columns[s], np.searchsorted(self.stages[s].blocks, b, side="right")
        return depth, least

    def canonical(self, genes: Genes) -> Genes:
        """The same networks with the genes of skipped blocks set to 0: (N, G)."""
        self._require(genes)
        return np.multiply(genes, self.active(genes), dtype=np.int8, casting="unsafe")

    def _require(self, genes: Genes) -> None:
        """`validate` where a glance does not tell that they are an array of choices."""
        if genes.__class__ is not np.ndarray or genes.dtype != np.int8 or genes.shape[1:] != self.counts.shape:
            self.validate(genes)

    def validate(self, genes: Genes) -> None:
        """Raise UserError where `genes` is not an (N, G) array of choices of this space."""
        if not isinstance(genes, np.ndarray):
            raise UserError(f"genes are a {type(genes).__name__}; give an array, np.array(genes, dtype=np.int8)")
        if genes.ndim != 2 or genes.shape[1] != len(self.genes):
            raise UserError(f"genes have shape {genes.shape}; {self.name} needs (N, {len(self.genes)})")
        if not np.issubdtype(genes.dtype, np.integer):
            raise UserError(f"genes are of {genes.dtype}; give choices as whole numbers, genes.astype(np.int8)")
        if not _within(genes, self.counts):
            row, column = np.argwhere((genes < 0) | (genes >= self.counts))[0]
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
        self._require(genes)
        columns, choices = self._features
        masked = np.where(self.active(genes), genes, np.int8(-1))
        return (masked.take(columns, axis=1) == choices).astype(np.float32)

    @cached_property
    def _features(self) -> tuple[NDArray[np.int64], Genes]:
        """The gene and the choice that each column of the one-hot features stands for."""
        choices = np.concatenate([np.arange(count, dtype=np.int8) for count in self.counts])
        return np.repeat(np.arange(len(self.genes)), self.counts), choices

    # -- values ------------------------------------------------------------------------------------------------------

    def encode(self, archs: Iterable[Arch]) -> Genes:
        """Genes of architectures, (N, G) canonical; raises UserError for a value that is not in this space.

        A depth that means the same network as a smaller one is taken as that, as in once-for-all's ResNet.
        """
        listed = list(archs) if np.iterable(archs) else []
        if not np.iterable(archs) or not all(isinstance(arch, Arch) for arch in listed):
            raise UserError(f"{archs} is no list of architectures; give [Arch(...)], or [Arch.from_dict(...)]")
        genes = np.zeros((len(listed), len(self.genes)), dtype=np.int8)
        for row, arch in zip(genes, listed, strict=True):
            width = self._as_long("width", arch.width * (self.widths if len(arch.width) == 1 else 1), self.widths)
            for column, value in enumerate((arch.resolution, *width, *self._chosen_depths(arch.depth))):
                row[column] = self._index(column, value)
            used = self.used(row[None])[0]
            for column, value in (pair for name in OF_BLOCKS for pair in self._block_pairs(name, arch, used)):
                row[column] = self._index(column, value)
        return self.canonical(genes)

    def decode(self, genes: Genes) -> list[Arch]:
        """Architectures of genes, with the kernels, expand ratios and operations of active blocks alone."""
        self.validate(genes)
        return [self._arch(*rows) for rows in zip(genes.tolist(), self.active(genes).tolist(), strict=True)]

    def _arch(self, choices: list[int], used: list[bool]) -> Arch:
        values = [numbers[choice] for numbers, choice in zip(self._numbers, choices, strict=True)]
        picked: dict[str, Any] = {name: tuple(compress(values[own], used[own])) for name, own in self._columns.items()}
        return Arch(**picked | {"resolution": values[0]})

    def _chosen_depths(self, given: tuple[float, ...]) -> list[float]:
        """Depths of the stages that choose them, from one for each of these or for every stage."""
        if len(given) == len(self.stages):
            given = tuple(given[s] for s, _ in self._choosing)
        given = self._as_long("depth", given, len(self._choosing))
        return [stage.nearest_depth(value) for value, (_, stage) in zip(given, self._choosing, strict=True)]

    def _as_long(self, name: str, given: tuple[float, ...], length: int) -> tuple[float, ...]:
        if len(given) != length:
            raise UserError(f"{name} {given} has {len(given)} entries; {self.name} has {length}")
        return given

    def _block_pairs(self, name: str, arch: Arch, used: NDArray[np.bool_]) -> list[tuple[int, float]]:
        """Pairs (column, value) of one dimension's genes of active blocks."""
        given, own = getattr(arch, name), self._own[name]
        kept = [(self.columns(name).start + i, i) for i, block in enumerate(own) if used[block]]
        if len(given) == len(own):
            return [(column, given[i]) for column, i in kept]
        if len(given) == len(kept):
            return [(column, value) for (column, _), value in zip(kept, given, strict=True)]
        if not len(own):
            if set(given) <= {value for stage in self.stages for value in stage.choices(name)}:
                return []
            raise UserError(f"{name} {given} is given, but {self.name} has no choice of it; leave {name} out")
        raise UserError(
            f"{name} has {len(given)} entries; give one for each of the {len(kept)} active blocks that choose it, "
            f"or for each of all {len(own)} such blocks of {self.name}"
        )

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
        for name, wanted in choices.items():
            known = {value for gene in self.genes[self.columns(name)] for value in gene.choices}
            most = self.counts[self.columns(name)].max(initial=0)
            if known and np.iterable(wanted) and (strange := set(wanted) - known):
                raise UserError(f"{name} {sorted(strange)} is not in space {self.name}; choose from {sorted(known)}")
            if isinstance(wanted, int | np.integer) and wanted > most > 1:
                raise UserError(f"{name}={wanted} keeps the {wanted} largest of {most} choices; give {name}=[{wanted}]")
        own: dict[str, Any] = {
            name: kept_choices(name, getattr(self, name), choices.get(name)) for name in ("resolution", "width")
        }
        return replace(self, stages=tuple(kept_stage(stage, choices) for stage in self.stages), **own)

    def adapt(self, *, in_channels: int, classes: int) -> Space:
        """The same space for images of `in_channels` channels in `classes` classes."""
        return replace(self, in_channels=in_channels, classes=classes)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `load_space` reads it."""
        return asdict(self)


def load_space(space: str | Path | Mapping[str, Any]) -> Space:
    """A Space by name, from a file of conf/space's form, or from the dict of `Space.to_dict`.

    A name is that of a file in conf/space; once-for-all's, as ofa_mbv3_d234_e346_k357_w1.0, stand for them too.
    """
    if isinstance(space, str):
        space = _known(space)
    if isinstance(space, Path):
        space = _read_yaml(space)
    if not isinstance(space, Mapping):
        return record(Space, space)
    if (target := space.get("_target_", SPACE)) != SPACE:
        raise UserError(f"a space with _target_={target} cannot be made; leave _target_ out, or give {SPACE}")
    return record(Space, {key: value for key, value in space.items() if key != "_target_"})


def _known(name: str) -> Path:
    """The file of a space in conf/space."""
    folder = Path(str(files("conf"))) / "space"
    known, short = sorted(path.stem for path in folder.glob("*.yaml")), name.replace(ELASTIC, "")
    if short not in known:
        choose = f"choose from {', '.join(known)}, or give a Path of another file"
        raise UserError(f"space {name!r} is not known; {choose}")
    return folder / f"{short}.yaml"


def _read_yaml(path: Path) -> Any:
    import yaml
    from omegaconf import OmegaConf  # Hydra's reader, to which 1e-3 is a number

    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as a space ({reason}); give a YAML file of conf/space's form") from None


def _within(genes: NDArray[Any], counts: NDArray[np.int64]) -> bool:
    """Whether all genes are choices, looked at 64 architectures at a time, which is ten times faster than by row."""
    whole = len(genes) // 64 * 64
    if whole and genes.dtype == np.int8 and genes.flags.c_contiguous:
        most = genes[:whole].view(np.uint8).reshape(whole // 64, -1).max(axis=0).reshape(64, -1)  # -1 is 255
        return bool((most < counts).all()) and _within(genes[whole:], counts)
    return bool(((genes >= 0) & (genes < counts)).all())


def _number(value: float) -> float:
    """Whole numbers as int."""
    return int(value) if float(value).is_integer() else float(value)
