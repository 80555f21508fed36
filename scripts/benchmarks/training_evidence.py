"""What training a supernet by one rule or another is worth, at the same cost.

    python scripts/benchmarks/training_evidence.py all --data cifar10 --path $OFA_DATA/cifar10 \\
        --space cifar_mbv3 --keep width=0.5 resolution=24 --images 10000 --budget 10 --seeds 3   # CPU: about an hour
    python scripts/benchmarks/training_evidence.py all --data digits --space digits_mbv3 --budget 2  # smoke run

`train` trains each arm with each seed and measures 50 random subnets, the smallest and the largest; `alone` trains 5
architectures alone for the epochs of a supernet; `cost` times steps; `table` prints what the file --out holds.  Every
finished unit of work is a line of --out, and training resumes, so the same command goes on where it was stopped, and
with another --source of as many epochs (to a tenth), another --out and the same --work none is trained alone again.

Cost is counted in epochs of the largest net: 3 of its MACs a net forward and backward, 1 a frozen teacher, on average
over drawn steps.  Every arm gets --budget such epochs, but flat_epochs, which gets as many epochs as shrinking.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from ofa.data import ImageData, Split, cifar10, digits, folder, parquet
from ofa.distill import Distillation
from ofa.errors import UserError
from ofa.evaluate import accuracy, specialise
from ofa.files import append_jsonl, read_jsonl
from ofa.sampling import draw
from ofa.schedule import Phase, Schedule
from ofa.space import Arch, Space, load_space
from ofa.supernet import Supernet
from ofa.table import layer_macs, layer_table
from ofa.train import Trainer
from ofa.training.trained import load_supernet
from ofa.training.watch import Watch
from scripts.benchmarks.about import about

SOURCES = {"cifar10": cifar10, "parquet": parquet, "folder": folder}
ONE_PHASE: dict[str, dict[str, Any]] = {
    "flat_cost": {"rule": "random"},
    "flat_epochs": {"rule": "random"},
    "sandwich_labels": {"rule": "sandwich"},
    "sandwich": {"rule": "sandwich", "random_nets": 2},
}
ARMS = (*ONE_PHASE, "shrinking", "shrinking_sandwich")
TAUGHT = {name: Distillation({"soft_labels": 1.0}, labels=1.0) for name in ("sandwich_labels", "shrinking")}
WATCH = Watch(random_nets=0, images=500, calibration=512)
QUIET = 200  # drawn steps over which the cost of a phase is averaged


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the runs are: everything that a figure depends on besides the code."""

    data: str
    space: Space
    images: int | None
    budget: float
    subnets: int
    batch: int
    lr: float
    split: str
    limit: int | None

    def about(self) -> dict[str, Any]:
        """As JSON values."""
        kept = {name: getattr(self, name) for name in self.__slots__ if name != "space"}
        return kept | {"space": self.space.name, "networks": self.space.size, "resolution": self.space.resolution}


# -- arms --------------------------------------------------------------------------------------------------------------


def arm(name: str, scale: Scale, steps_per_epoch: int) -> Schedule:
    """The schedule of an arm, with as many epochs as its share of the cost allows."""
    if name == "flat_epochs":
        epochs = arm("shrinking", scale, steps_per_epoch).epochs
        return replace(_written(name, scale), epochs=epochs)
    schedule = _written(name, scale)
    cost = sum(phase.epochs * phase_cost(phase, scale.space) for phase in schedule.phases)
    total = sum(phase.epochs for phase in schedule.phases)
    return replace(schedule, epochs=round(scale.budget * total / cost * steps_per_epoch) / steps_per_epoch)


def _written(name: str, scale: Scale) -> Schedule:
    """An arm's phases with their shares of the epochs; the rate after the first phase of several is half of it."""
    phases = [Phase("all", 10, scale.lr, **ONE_PHASE[name])] if name in ONE_PHASE else _shrinking(name, scale.lr)
    return Schedule(tuple(phases), scale.batch, weight_decay=5e-4, clip_norm=5.0, distill=TAUGHT.get(name))


def _shrinking(name: str, lr: float) -> list[Phase]:
    """Progressive shrinking: by once-for-all's rule, or with a sandwich of three nets in each step."""
    rule: dict[str, Any] = {"rule": "random", "teacher": "full"}
    if name == "shrinking_sandwich":
        rule = {"rule": "sandwich", "teacher": "inplace", "random_nets": 1}
    small = {"kernel": 1, "depth": 1, "expand": 1, "op": 1, "width": 1}
    opened: tuple[dict[str, int], ...] = ({"depth": 1, "expand": 1, "width": 1}, {"expand": 1, "width": 1}, {})
    phases = [Phase("full", 4, lr, rule="largest", keep=small)]
    for phase, keep, nets in zip(("kernel", "depth", "expand"), opened, (1, 2, 4), strict=True):
        options = {"random_nets": nets} | rule
        phases.append(Phase(phase, 2, lr / 2, keep=keep, sort_channels=phase == "expand", **options))
    return phases


def phase_cost(phase: Phase, space: Space) -> float:
    """Cost of a step of a phase, in steps of the largest net at the mean resolution."""
    own, rng = phase.space(space), np.random.default_rng(0)

    def macs(archs: list[Arch]) -> float:
        return float(layer_macs(layer_table(space, space.encode(archs))).sum())

    spent, largest = 0.0, 0.0
    for _ in range(QUIET):
        resolution = int(rng.choice(own.resolution))
        top = [replace(space.decode(space.largest())[0], resolution=resolution)]
        spent += 3 * macs(draw(phase, own, rng, resolution=resolution))
        spent += macs(top) if phase.teacher in ("full", "previous") else 0.0
        largest += 3 * macs(top)
    return spent / largest


# -- units of work -----------------------------------------------------------------------------------------------------


def train(scale: Scale, data: ImageData, name: str, seed: int, work: Path, device: str) -> dict[str, Any]:
    """Train an arm and measure its nets: a line of the result; train_s is of the process that ended the training."""
    schedule = arm(name, scale, data.size("train") // scale.batch)
    started = _now(device)
    supernet = Trainer(scale.space, data, schedule, work, seed=seed, watch=WATCH, device=device).run()
    facts = {"arm": name, "seed": seed, "epochs": schedule.epochs, "train_s": _now(device) - started}
    return measure(scale, data, supernet) | facts


def measure(scale: Scale, data: ImageData, supernet: Supernet) -> dict[str, Any]:
    """Accuracy (0 to 1) of random subnets, the same ones each time, of the smallest and of the largest."""
    space = scale.space
    archs = space.decode(space.sample(scale.subnets, np.random.default_rng(11)))
    ends = {"smallest": space.smallest(), "largest": space.largest()}
    top1 = {name: inherited(scale, data, supernet, space.decode(genes)[0]) for name, genes in ends.items()}
    return top1 | {"random": [inherited(scale, data, supernet, arch) for arch in archs]}


def inherited(scale: Scale, data: ImageData, supernet: Supernet, arch: Arch) -> float:
    """Accuracy of one net with the supernet's weights, batch norm recalibrated."""
    net = specialise(supernet, arch, data)
    return accuracy(net, data, scale.split, resolution=arch.resolution, limit=scale.limit)


def alone(scale: Scale, data: ImageData, i: int, source: str, work: Path, device: str) -> dict[str, Any]:
    """Train architecture i by itself for as many epochs as the supernet of an arm had, with that arm's first rate."""
    own = load_supernet(work / f"{source}-0", scale.space).to(device)
    arch = scale.space.decode(scale.space.sample(i + 1, np.random.default_rng(7))[i:])[0]
    epochs = arm(source, scale, data.size("train") // scale.batch).epochs
    phase = Phase("alone", 1, scale.lr, rule="fixed", arch=arch, keep={"resolution": [arch.resolution]}, teacher="none")
    schedule = Schedule((phase,), scale.batch, epochs=epochs, weight_decay=5e-4, clip_norm=5.0)
    folder = work / f"alone-{i}-{epochs:.1f}"
    watch = replace(WATCH, images=50, calibration=50)
    supernet = Trainer(scale.space, data, schedule, folder, seed=100 + i, watch=watch, device=device).run()
    macs = int(layer_macs(layer_table(scale.space, scale.space.encode([arch]))).sum())
    found = {"alone": inherited(scale, data, supernet, arch), "inherited": inherited(scale, data, own, arch)}
    return found | {"arch": arch.to_dict(), "macs": macs, "epochs": epochs, "source": source}


def cost(scale: Scale, data: ImageData, rounds: int, work: Path, device: str) -> dict[str, Any]:
    """Seconds of steps of the largest net and of sandwiches, in turns; their ratios with quartiles."""
    rules = {
        "largest": Phase("largest", 1, 1e-3, rule="largest"),
        "sandwich_1": Phase("sandwich_1", 1, 1e-3, random_nets=1),
        "sandwich_2": Phase("sandwich_2", 1, 1e-3, random_nets=2),
    }
    space = scale.space.restrict(resolution=1)
    x, y = next(data.batches("train", scale.batch, space.resolution[-1], rng=np.random.default_rng(0)))
    runs = {}
    for name, phase in rules.items():
        runs[name] = Trainer(space, data, Schedule((phase,), scale.batch), work / name, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in rules}
    for i in range(rounds + 1):
        for name, run in runs.items():
            run.step = min(i, int(run.ends[-1]) - 1)
            started = _now(device)
            run._train_step(0, x, y)
            if i:
                seconds[name].append(_now(device) - started)
    base = np.array(seconds["largest"])
    rows: dict[str, Any] = {"n": rounds, "batch": scale.batch, "resolution": space.resolution[-1]}
    for name, spent in seconds.items():
        low, middle, high = np.quantile(np.array(spent) / base, (0.25, 0.5, 0.75))
        speed = scale.batch / float(np.median(spent))
        rows[name] = {"ratio": middle, "quartiles": [low, high], "images_per_s": speed}
    return rows


def _now(device: str) -> float:
    """Seconds: of this process on a CPU, which other work does not disturb, of the clock on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


# -- the table ---------------------------------------------------------------------------------------------------------


def table(lines: list[dict[str, Any]]) -> str:
    """Every row that the lines of a file allow."""
    trained = {(line["arm"], line["seed"]): line for line in lines if "arm" in line}
    text = [
        "arm                 mean of random      smallest            largest             epochs  CPU or GPU s  seeds"
    ]
    values = {name: _values(trained, name) for name in ARMS}
    for name, found in values.items():
        if len(found):
            cells = [f"{100 * m:5.2f} ± {100 * s:4.2f}      " for m, s in zip(found.mean(0), _std(found), strict=True)]
            runs = [line for (own, _), line in trained.items() if own == name]
            spent = np.mean([line["train_s"] for line in runs])
            text.append(
                f"{name:20}{''.join(f'{c:20}' for c in cells)}{runs[0]['epochs']:6.2f}  {spent:12.0f}  {len(runs)}"
            )
    text += [_compare(trained, *pair) for pair in PAIRS if all(len(values[name]) for name in pair)]
    text += [_alone_text(found) for found in [[line for line in lines if "alone" in line]] if found]
    for line in (line for line in lines if "sandwich_2" in line):
        for name in ("sandwich_1", "sandwich_2"):
            low, high = line[name]["quartiles"]
            text.append(
                f"{name} step / largest step: {line[name]['ratio']:.2f} [{low:.2f}, {high:.2f}], n={line['n']}, batch "
                f"{line['batch']}, {line['resolution']} px; largest {line['largest']['images_per_s']:.0f} images/s"
            )
    return "\n".join(text)


PAIRS = [("flat_cost", other) for other in ARMS[1:]] + [("sandwich", "shrinking"), ("shrinking", "flat_epochs")]


def _values(trained: dict[tuple[str, int], dict[str, Any]], name: str) -> NDArray[np.float64]:
    """(seeds, 3): mean of the random nets, smallest, largest."""
    lines = [line for (own, _), line in sorted(trained.items()) if own == name]
    return np.array([[np.mean(line["random"]), line["smallest"], line["largest"]] for line in lines]).reshape(-1, 3)


def _std(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)


def _compare(trained: dict[tuple[str, int], dict[str, Any]], a: str, b: str) -> str:
    """Differences of two arms, paired by seed, with a paired t-test; and how many of the random nets gained."""
    seeds = sorted({seed for own, seed in trained if own == a} & {seed for own, seed in trained if own == b})
    first, second = (_values({k: v for k, v in trained.items() if k[1] in seeds}, name) for name in (a, b))
    gain = 100 * (first - second)
    cells = []
    for i, what in enumerate(("random", "smallest", "largest")):
        p = stats.ttest_rel(first[:, i], second[:, i]).pvalue if len(seeds) > 1 else np.nan
        cells.append(f"{what} {gain[:, i].mean():+.2f} ± {_std(gain)[i]:.2f} (p {p:.3f})")
    nets = np.mean([[trained[own, seed]["random"] for seed in seeds] for own in (a, b)], axis=1)
    better = int((nets[0] > nets[1]).sum())
    return f"{a} - {b}, points: {', '.join(cells)}; better {better} of {nets.shape[1]} nets; {len(seeds)} seeds"


def _alone_text(lines: list[dict[str, Any]]) -> str:
    gap = 100 * np.array([line["inherited"] - line["alone"] for line in lines])
    each = ", ".join(f"{g:+.2f}" for g in gap)
    spread = f" ± {gap.std(ddof=1):.2f}" if len(gap) > 1 else ""
    what = f"inherited ({lines[0]['source']}) - trained alone"
    return f"{what}, points: {gap.mean():+.2f}{spread}; each {each}; n={len(gap)}"


# -- the command -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Do what the file --out does not hold yet, and print its table."""
    args = _arguments()
    data, scale = _prepare(args)
    done = {line["unit"]: line for line in read_jsonl(args.out)}
    if (made := done.get("about")) and made["scale"] != (now := json.loads(json.dumps(scale.about()))):
        raise UserError(f"{args.out} is of {made['scale']}, not {now}; give another --out")
    units: list[tuple[str, Any]] = [("about", lambda: {"scale": scale.about()} | about() | _machine(args))]
    if args.part in ("train", "all"):
        for seed in range(args.seeds):
            for name in args.arms:
                folder = args.work / f"{name}-{seed}"
                units.append((folder.name, partial(train, scale, data, name, seed, folder, args.device)))
    if args.part in ("alone", "all"):
        for i in range(args.nets):
            units.append((f"alone-{i}", partial(alone, scale, data, i, args.source, args.work, args.device)))
    if args.part in ("cost", "all"):
        units.append(("cost", partial(cost, scale, data, args.rounds, args.work / "cost", args.device)))
    for i, (unit, call) in enumerate(units):
        if unit not in done:
            started = time.monotonic()
            append_jsonl(args.out, {"unit": unit} | call())
            print(f"{i + 1}/{len(units)} {unit}: {time.monotonic() - started:.0f} s", flush=True)
    lines = read_jsonl(args.out)
    print(json.dumps(lines[0]))
    print(table(lines))


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    return {} if args.device == "cpu" else {"gpu": torch.cuda.get_device_name()}


def _prepare(args: argparse.Namespace) -> tuple[ImageData, Scale]:
    """The data, with part of its training images, and the scale of the runs."""
    data = digits() if args.data == "digits" else SOURCES[args.data](args.path)
    if args.images is not None:
        chosen = torch.from_numpy(np.random.default_rng(5).permutation(data.size("train"))[: args.images])
        if not isinstance(data.train.images, torch.Tensor):
            raise UserError("--images takes a part of images in memory; these do not fit")
        data = replace(data, train=Split(data.train.images[chosen], data.train.labels[chosen]))
    keep = {name: [float(v) for v in values.split(",")] for name, _, values in (k.partition("=") for k in args.keep)}
    space = load_space(args.space).adapt(in_channels=data.channels, classes=len(data.classes)).restrict(**keep)
    numbers = (args.images, args.budget, args.subnets, args.batch, args.lr, args.split, args.limit)
    return data, Scale(args.data, space, *numbers)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["train", "alone", "cost", "table", "all"])
    parser.add_argument("--data", choices=["digits", *SOURCES], default="cifar10")
    parser.add_argument("--path", help="folder of the data")
    parser.add_argument("--space", default="cifar_mbv3")
    parser.add_argument(
        "--keep", nargs="*", default=[], help="choices of a dimension, as in width=0.5 resolution=24,28"
    )
    parser.add_argument("--images", type=int, help="training images (default: all)")
    parser.add_argument("--budget", type=float, default=10, help="cost of each run, in epochs of the largest net")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--subnets", type=int, default=50, help="random subnets measured in each run")
    parser.add_argument("--nets", type=int, default=5, help="architectures trained alone")
    parser.add_argument("--source", choices=ARMS, default="flat_cost", help="arm whose seed 0 they inherit from")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each kind")
    parser.add_argument("--split", choices=["val", "test"], default="val", help="images that accuracies are of")
    parser.add_argument("--limit", type=int, help="of these images (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("build/evidence/result.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("build/evidence"), help="folder of the runs' checkpoints")
    return parser.parse_args()


if __name__ == "__main__":
    main()
