"""ofa-compress: any chain of compression steps on one network, with the same numbers after each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ofa.errors import UserError
from ofa.files import append_jsonl, atomic_write, read_jsonl, write_json
from scripts.cli import make, stage_command
from scripts.parts import load_data
from scripts.progress import Progress
from scripts.stage import open_stage, plain

if TYPE_CHECKING:
    from torch import nn

    from ofa.compress.allocation import Sensitivity
    from ofa.compress.chain import Step, Work
    from ofa.data import ImageData
    from ofa.distill.nets import Named

READS = ("data", "seed", "network", "step", "sensitivity")
STEPS, BEFORE = "steps.jsonl", "before"


@stage_command("step")
def main(cfg: DictConfig) -> list[str]:
    """Compress network=<card> by step=[magnitude,kmeans].  Writes <run>/compress/<network>/<steps>.

    A network is a card, a block list or torchvision's name, with weights after an @, as for ofa-distill.  Each step
    leaves <step>.json, a card for this command and others, and <step>.onnx, in which quantized layers hold whole
    numbers (for x86 processors without VNNI give step.int8.weight_bits=7), or says why it cannot; and <step>.ofap, its
    weights packed, which network=<network>@<step>.ofap reads where the step left the layers of <network> as they were.
    table.json and front.svg hold accuracy and size.
    """
    if not cfg.network or not cfg.step:
        raise UserError(
            "network or step has no value; give both, such as "
            "network=runs/digits/specialize/stm32f746/float.json step=[magnitude,kmeans]"
        )
    chain = "-".join(cfg.step)
    with open_stage(cfg, f"compress/{folder_name(cfg.network)}/{chain}", READS) as stage:
        if not stage.done:
            from ofa.compress.chain import Work, check_network

            steps, points = _steps(cfg), _points(cfg)
            data = load_data(cfg)
            named, resolution = _network(cfg, data)
            check_network(named.net)
            if points is not None:
                _sensitivities(*points, named.net, Work(data, resolution, cfg.seed), stage.folder)
            _compress(cfg, steps, named, data, resolution, stage.folder)
        rows = read_jsonl(stage.folder / STEPS)
        write_json(stage.folder / "table.json", {"network": str(cfg.network), "steps": rows})
        atomic_write(stage.folder / "front.svg", _front(rows))
        print(_table(rows))
        made = [file for kind in ("onnx", "json") if (file := stage.folder / f"{rows[-1]['step']}.{kind}").exists()]
    if made:
        print(f"{' and '.join(file.name for file in made)} in {made[0].parent}")
    return [f"network={file}" for file in made if file.suffix == ".json"]


def _steps(cfg: DictConfig) -> dict[str, Step]:
    """All steps, made before the first begins, so that a mistake in the last costs no work."""
    from ofa.compress.order import check_order
    from ofa.extras import require_packages

    steps = {name: make(step) for name, step in cfg.step.items()}
    check_order(steps)
    for step in steps.values():
        require_packages(step)
    return steps


def _compress(
    cfg: DictConfig, steps: Mapping[str, Step], named: Named, data: ImageData, resolution: int, folder: Path
) -> None:
    """Each step after the last that is on disk; a step's network is kept for the next, and dropped at the end."""
    import torch

    from ofa.compress.chain import Work, run_step
    from ofa.compress.layers import device_of
    from ofa.compress.numbers import measure

    done = [row["step"] for row in read_jsonl(folder / STEPS)]
    left = [name for name in (BEFORE, *steps) if name not in done]
    first = net = named.net
    if len(done) > 1 and left:  # a process that was killed at the end may have dropped the networks already
        path, place = _kept(folder, done[-1]), device_of(first)
        net = torch.load(path, map_location=place, weights_only=False)  # this folder's own file: the whole module
    for name in left:
        with Progress(f"compress {name}") as progress:
            work = Work(data, resolution, cfg.seed, teacher=first, report=progress)
            if name != BEFORE:
                net = run_step(name, steps[name], net, work)
                torch.save(net, _kept(folder, name))
            numbers, lacking = measure(name, net, work, folder / f"{name}.ofap"), []
            if name != BEFORE:
                so_far = [*steps][: [*steps].index(name) + 1]
                lacking = _save(folder / name, named._replace(net=net), work, numbers.accuracy, so_far)
            append_jsonl(folder / STEPS, asdict(numbers))
        print("".join(f"{name}: {line}\n" for line in lacking), end="")
    for path in folder.glob("*.pt"):
        path.unlink()


def _save(path: Path, named: Named, work: Work, accuracy: float, steps: Sequence[str]) -> list[str]:
    """The network as ONNX and as a card, and which of them it cannot be; path: without a suffix."""
    from ofa.compress.affine import ActivationGrid
    from ofa.compress.fold import unfolded
    from ofa.compress.layers import image_of
    from ofa.compress.numbers import onnx_bytes
    from ofa.export.card import save_net
    from ofa.export.onnx import weight_bits
    from predictors.spec import spec_costs

    files, lacking, plain = [path.with_suffix(".onnx")], [], unfolded(named.net)
    try:
        atomic_write(files[0], onnx_bytes(named.net, image_of(named.net, work), grids=True))
    except UserError as error:
        files, lacking = [], [f"no ONNX file ({error})"]
    if plain is None:
        lacking.append("no card: its layers are not those of a card")
    else:
        quantized = any(isinstance(module, ActivationGrid) for module in named.net.modules())
        values = {"accuracy": accuracy, **spec_costs(plain.spec, bits=8 if quantized else 32)}
        if quantized and files:
            values["weight_bits"] = weight_bits(files[0])
        card = named._replace(net=plain).card(work.data, work.seed, values, {"steps": [*steps]})
        save_net(path.with_suffix(".json"), plain, card, files)
    return lacking


def _kept(folder: Path, step: str) -> Path:
    return folder / f"{step}.pt"


def _points(cfg: DictConfig) -> tuple[int, list[float]] | None:
    """Images and shares of zeros of each layer's sensitivity, None where it is not asked for."""
    images, given = cfg.sensitivity.images, plain(cfg.sensitivity.levels)
    if not images:
        return None
    if isinstance(images, bool) or not isinstance(images, int) or images < 0:
        raise UserError(f"sensitivity.images={images} must be a whole number of validation images, or null")
    levels = given if isinstance(given, list) else [given]
    if not levels or not all(isinstance(level, int | float) and 0 < level <= 1 for level in levels):
        raise UserError(f"sensitivity.levels={given} must be shares of zeros, above 0 and at most 1, such as [0.5,0.9]")
    return images, levels


def _sensitivities(images: int, levels: Sequence[float], net: nn.Module, work: Work, folder: Path) -> None:
    """What zeros in each layer alone cost: sensitivity.json and .svg."""
    if (folder / "sensitivity.json").exists():
        return
    from ofa.compress.allocation import sensitivity

    rows = sensitivity(net, work, levels=levels, images=images)
    write_json(folder / "sensitivity.json", [asdict(row) for row in rows])
    atomic_write(folder / "sensitivity.svg", _curves(rows))
    print(f"validation top-1 (%) with a share of zeros in one layer alone, {images} images\n{_sensitivity_table(rows)}")


def _network(cfg: DictConfig, data: ImageData) -> tuple[Named, int]:
    """The network to compress, in evaluation mode on train.device, and the side of its images in pixels."""
    import torch

    from ofa.distill.nets import load_net, require_images
    from ofa.parallel import found_device
    from ofa.static import StaticNet

    torch.manual_seed(cfg.seed)  # of a network without weights
    named = load_net(str(cfg.network), data)
    net = named.net.to(found_device(cfg.train.device))
    resolution = net.spec.resolution if isinstance(net, StaticNet) else data.side
    require_images(net, f"network {cfg.network}", data, resolution)
    return named, resolution


def folder_name(network: str) -> str:
    """A folder's name for a network: specialize/phone/float.json becomes phone-float."""
    path = Path(str(network).partition("@")[0].replace(":", "-"))
    return "-".join(part for part in (path.parent.name, path.stem) if part)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """The chain as text, a line for each step."""
    head = (
        *("step", "top-1 (%)", "MACs (M)", "not by zero", "bit-operations (G)", "file (kB)", "smaller"),
        *("PyTorch's peak (kB)", "ms"),
    )
    return _columns([head, *(_line(row, rows[0]["file_bytes"]) for row in rows)])


def _line(row: dict[str, Any], first: int) -> tuple[str, ...]:
    return (
        row["step"],
        f"{100 * row['accuracy']:.2f}",
        f"{row['macs'] / 1e6:.2f}",
        f"{row['sparse_macs'] / 1e6:.2f}",
        f"{row['bit_operations'] / 1e9:.3f}",
        f"{row['file_bytes'] / 1e3:.1f}",
        f"{first / row['file_bytes']:.2f}x",
        f"{row['peak_memory_bytes'] / 1e3:.1f}",
        "" if row["latency_ms"] is None else f"{row['latency_ms']:.3f}",
    )


def _sensitivity_table(rows: Sequence[Sensitivity]) -> str:
    levels = sorted({row.level for row in rows})
    found = {(row.layer, row.level): f"{100 * row.accuracy:.1f}" for row in rows}
    layers = list(dict.fromkeys(row.layer for row in rows))
    return _columns([("layer", *map(str, levels)), *((n, *(found[n, level] for level in levels)) for n in layers)])


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"{line[0]:{widths[0]}}" + "".join(map(_right, line[1:], widths[1:])) for line in lines)


def _right(cell: str, width: int) -> str:
    return f"  {cell:>{width}}"


def _front(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy against the size of the packed file, each step a point, as SVG."""
    figure, axes = _figure("packed file (kB)", "test top-1 (%)")
    x, y = [row["file_bytes"] / 1e3 for row in rows], [100 * row["accuracy"] for row in rows]
    axes.plot(x, y, "o-", color="tab:blue")
    for row, left, top in zip(rows, x, y, strict=True):
        axes.annotate(row["step"], (left, top), textcoords="offset points", xytext=(4, 6))
    axes.set_xscale("log")
    return _svg(figure)


def _curves(rows: Sequence[Sensitivity]) -> str:
    """Accuracy against the share of zeros, a curve for each layer, as SVG."""
    figure, axes = _figure("share of zeros in one layer", "validation top-1 (%)")
    layers = list(dict.fromkeys(row.layer for row in rows))
    for i, layer in enumerate(layers):
        own = [row for row in rows if row.layer == layer]
        colour = (i / max(1, len(layers) - 1)) * 0.9
        axes.plot([r.level for r in own], [100 * r.accuracy for r in own], color=(colour, 0.3, 1 - colour), label=layer)
    axes.legend(fontsize=6, ncols=2, loc="lower left")
    return _svg(figure)


def _figure(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Any) -> str:
    import io

    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


if __name__ == "__main__":
    main()
