"""Training, measuring and compressing leave nothing behind on the processor when networks are on another device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from torch import nn

from ofa.compress.chain import Work
from ofa.compress.numbers import measure
from ofa.data import ImageData
from ofa.evaluate import accuracy, specialise
from ofa.extras import installed
from ofa.finetune import Finetuning, finetune
from ofa.parallel import found_device
from ofa.space import Space, load_space
from ofa.supernet import Supernet
from ofa.train import Trainer
from ofa.training.watch import Watch
from predictors import Macs
from predictors.measure import SubnetAccuracy, _start_worker
from scripts.cli import make
from tests.ofa.nets import RESNET, random_net
from tests.second_device import GPU, Distant, second_device

CONF = Path(__file__).parents[2] / "conf"
FINETUNING = Finetuning(epochs=0.06, batch_size=32)


def names(section: str, *but: str) -> list[str]:
    return sorted(path.stem for path in (CONF / section).glob("*.yaml") if path.stem not in but)


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_module("conf", version_base="1.3"):
        yield


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with second_device() as device:
        yield device


def devices(net: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in (*net.parameters(), *net.buffers())}


def test_what_was_not_moved_is_refused(gpu: torch.device) -> None:
    there, here = torch.ones(3, device=gpu), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"on the same device, but aten\.add got lazy:0 and cpu"):
        there + here
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()
    assert (there + torch.tensor(2.0)).device == gpu, "numbers may come from anywhere"
    assert torch.equal((there + here.to(gpu)).cpu(), here + 1)
    assert isinstance(nn.Linear(3, 2).to(gpu).weight.data, Distant)


@pytest.mark.parametrize(
    "name",
    ["digits_mbv3", *(pytest.param(name, marks=pytest.mark.slow) for name in names("space", "digits_mbv3"))],
)
def test_a_supernet_gives_there_what_it_gives_here(name: str) -> None:
    space = load_space(name).adapt(in_channels=1, classes=10)
    torch.manual_seed(0)
    supernet = Supernet(space)
    x, y = torch.randn(4, 1, min(space.resolution), min(space.resolution)), torch.arange(4)
    for genes in (space.largest(), space.smallest()):
        arch = space.decode(genes)[0]
        gradients = []
        for device in (torch.device("cpu"), GPU):
            with second_device():
                supernet.to(device).zero_grad()
                F.cross_entropy(supernet(x.to(device), arch), y.to(device)).backward()
                gradients.append([p.grad.cpu() for p in supernet.parameters() if p.grad is not None])
                supernet.to("cpu")
        assert len(gradients[0]) == len(gradients[1])
        norms = [torch.stack([part.norm() for part in parts]) for parts in gradients]
        assert torch.allclose(norms[1], norms[0], rtol=1e-2, atol=1e-4 * float(norms[0].max()))


@pytest.mark.parametrize(
    "name", ["cifar10_cpu", *(pytest.param(n, marks=pytest.mark.slow) for n in names("schedule", "cifar10_cpu"))]
)
def test_every_schedule_trains_there(
    name: str, gpu: torch.device, tmp_path: Path, data: ImageData, space: Space
) -> None:
    written = make(compose("config", [f"schedule={name}"]).schedule)
    phases = tuple(replace(phase, measured=10, candidates=5) for phase in written.phases)
    schedule = replace(written, phases=phases, batch_size=32, epochs=64 / data.size("train"))
    options: dict[str, Any] = {"watch": Watch(random_nets=0, images=30, calibration=30), "average": 0.9}
    run = Trainer(space, data, schedule, tmp_path, device=gpu, learn=lambda genes, top1: Macs(space), **options)
    assert devices(run.run()) == {gpu}


@pytest.mark.parametrize(
    "name", ["soft_labels", *(pytest.param(n, marks=pytest.mark.slow) for n in names("distill", "soft_labels"))]
)
def test_every_way_to_distil_works_there(name: str, gpu: torch.device, data: ImageData, tmp_path: Path) -> None:
    settings = replace(FINETUNING, distill=make(compose("config", [f"distill={name}"]).finetune.distill), muon=0.1)
    if settings.distill.reads_logits and not settings.distill.mutual:
        settings = replace(settings, epochs=1.06, views=1)  # what teachers said is read again
    net = finetune(random_net().to(gpu), data, settings, teacher=random_net(RESNET).to(gpu), resolution=16)
    assert devices(net) == {gpu}


@pytest.mark.slow
@pytest.mark.parametrize("name", names("step"))
def test_every_step_of_compression_works_there(name: str, gpu: torch.device, data: ImageData, tmp_path: Path) -> None:
    if name == "pt2e" and not installed("torchao"):
        pytest.skip("torchao is not installed")
    step = make(compose("config", [f"step={name}"]).step[name])
    if getattr(step, "finetuning", None):
        step = replace(step, finetuning=replace(step.finetuning, epochs=0.06))
    net = random_net().to(gpu)
    work = Work(data, 16, teacher=net)
    made = step(net, work)
    assert devices(made) == {gpu}
    numbers = measure(name, made, work, tmp_path / "net.ofap", images=60)
    assert (numbers.latency_ms is None) == (name in ("gating", "xnor")), "these have no ONNX graph"


@pytest.mark.parametrize("int8", [False, True])
def test_subnets_are_measured_there(
    int8: bool, gpu: torch.device, data: ImageData, space: Space, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    supernet = Supernet(space).to(gpu).eval()
    genes = space.sample(2, np.random.default_rng(0))
    options: dict[str, Any] = {"images": 60, "calibration": 60, "int8": int8}
    with SubnetAccuracy(space, lambda process: (supernet, data), tmp_path / "log.jsonl", **options) as measured:
        assert np.all(measured(genes) >= 0)
    net = specialise(supernet, space.decode(genes)[0], data, images=60)
    assert devices(net) == {gpu}
    there = accuracy(net, data, "val", resolution=16)
    assert abs(there - accuracy(net.cpu(), data, "val", resolution=16)) < 0.02


def test_processes_share_out_the_gpus_that_they_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [found_device(None, process) for process in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [found_device(given, 1) for given in ("cpu", "cuda:0")] == ["cpu", "cuda:0"]
    assert found_device(None) == "cuda"


def test_each_worker_loads_by_a_number_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr("predictors.measure.end_with", lambda parent: None)
    monkeypatch.setattr("predictors.measure._worker", [])
    numbers = get_context("spawn").SimpleQueue()
    for number in range(3):
        numbers.put(number)
    for _ in range(3):
        _start_worker(loaded.append, 3, 0, numbers)  # type: ignore[arg-type, return-value]
    assert loaded == [0, 1, 2]
