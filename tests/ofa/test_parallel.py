"""Two processes train as one, go on after a kill, and share the work; a batch in parts is the batch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ofa.data import digits
from ofa.errors import UserError
from ofa.finetune import Finetuning, finetune
from ofa.parallel import Parallel, World, processes
from ofa.precision import Precision
from ofa.supernet import Supernet
from ofa.train import Trainer
from ofa.training.checkpoint import read_checkpoint, write_checkpoint
from ofa.training.gradients import Add, Gradients, Scale, compile_blocks
from ofa.weights import load_tensors
from tests.ofa import parallel_worker as worker
from tests.ofa.nets import RESNET, random_net

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start two processes."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(line, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


class Alone(World):
    """The first of two processes, where the other has nothing to say."""

    def told(self, value: Any) -> Any:
        return value

    def wait(self) -> None:
        """Not."""

    def spread(self, tensors: Any, owners: Any) -> None:
        """Not."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    path = tmp_path_factory.mktemp("two")
    process = torchrun("--standalone", str(ROOT / "tests/ofa/parallel_worker.py"), str(path))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_the_whole_batch(found: list[dict[str, Any]]) -> None:
    for values in found:
        assert values["none"] < 1e-5
        assert 1e-5 < values["fp16"] < 2e-3, "half precision has 11 bits"


@pytest.mark.slow
def test_parameters_that_no_network_used_stay_without_a_gradient(found: list[dict[str, Any]]) -> None:
    alone = worker.net()
    x, y = worker.images()
    for arch in worker.ENDS:
        F.cross_entropy(alone(x, arch), y).backward()
    used = [p.grad is not None for p in alone.parameters()]
    assert not all(used)
    assert [values["used"] for values in found] == [used, used]


@pytest.mark.slow
def test_what_powersgd_does_not_send_it_remembers(found: list[dict[str, Any]]) -> None:
    for values in found:
        assert values["powersgd sent"] > 0.01, "two columns are not the whole gradient"
        assert values["powersgd sent and held"] < 1e-5


@pytest.mark.slow
def test_powersgd_remembers_nothing_of_a_step_that_overflowed_or_was_undone(found: list[dict[str, Any]]) -> None:
    assert [values["overflowed"] for values in found] == [[False, True, False]] * 2


@pytest.mark.slow
def test_both_processes_hold_the_same_weights_and_a_resumed_run_ends_as_an_uninterrupted_one(
    found: list[dict[str, Any]],
) -> None:
    for values in found:
        assert values["ranks"] == 0
        assert values["resumed"] == [0, 0]


@pytest.mark.slow
def test_a_network_fine_tuned_by_two_processes_is_that_of_one(found: list[dict[str, Any]]) -> None:
    for values in found:
        assert values["tuned"] < 1e-5
        assert values["tuned ranks"] == 0
        assert values["tuned again"] == [0, 0], "after a kill they go on, with what the teacher said"


@pytest.mark.slow
def test_one_process_goes_on_with_a_fine_tuning_that_two_began(folder: Path) -> None:
    """It divides batches otherwise, so that the teacher is asked again: no answer is another batch's."""
    file, steps, batches = folder / "tuned half.safetensors", list[int](), list[int]()
    teacher = random_net(RESNET)
    teacher.register_forward_hook(lambda net, inputs, out: batches.append(len(out)))
    options: dict[str, Any] = {"resolution": 16, "checkpoint": file, "report": lambda v: steps.append(v["step"])}

    def killed(values: dict[str, Any]) -> None:
        steps.append(values["step"])
        if values["step"] == 6:
            raise worker.Killed

    with patch("ofa.distill.distiller.fast", lambda net: net), patch("ofa.finetune.SAVE_SECONDS", -1.0):
        with pytest.raises(worker.Killed):
            finetune(random_net(), digits(), worker.TUNING, teacher=teacher, **options | {"report": killed})
        finetune(random_net(), digits(), worker.TUNING, teacher=teacher, **options)
    assert steps == list(range(5, 19))
    assert batches.count(125) == 9, "each of the nine batches once by one process"
    assert not list(folder.glob("tuned half.answers*"))


@pytest.mark.slow
def test_two_processes_that_go_on_twice_where_one_stopped_end_as_if_once(found: list[dict[str, Any]]) -> None:
    assert [values["tuned twice"] for values in found] == [0, 0]


def test_a_batch_too_small_for_all_processes_is_refused() -> None:
    with pytest.raises(
        UserError, match="a batch of 3 has less than 2 images for each of 2 processes; raise batch_size"
    ):
        finetune(random_net(), digits(), Finetuning(batch_size=3), world=Alone(size=2))


@pytest.mark.slow
def test_each_process_turns_a_part_of_the_weights_by_muon_as_one_turns_all(found: list[dict[str, Any]]) -> None:
    (first, every, _), (second, _, _) = (values["turned"] for values in found)
    assert first + second == every and min(first, second) > every // 4
    assert max(values["turned"][2] for values in found) < 1e-5


@pytest.mark.slow
def test_processes_talk(found: list[dict[str, Any]]) -> None:
    assert [values["told"] for values in found] == [0, 0]
    assert [values["merged"] for values in found] == [["1", "0"], ["1", "0"]]
    assert [values["sum"] for values in found] == [3.0, 3.0]


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(folder: Path) -> None:
    run = Trainer(worker.SPACE, digits(), worker.SCHEDULE, folder / "half", watch=worker.WATCH, save_seconds=0.0)
    steps: list[int] = []
    run.report = lambda values: steps.append(values["step"])
    run.run()
    assert steps[0] == 10
    assert (folder / "half/checkpoint.safetensors").exists()
    assert not (folder / "half/checkpoint").exists(), "one checkpoint, not two"
    assert load_tensors(folder / "half/checkpoint.safetensors")[1]["step"] == run.ends[-1]


def test_the_newer_of_two_checkpoints_counts_and_a_torn_one_is_named(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, {"a": torch.ones(2)}, {"step": 3}, World())
    (tmp_path / "checkpoint/step-2").mkdir(parents=True)
    latest = tmp_path / "checkpoint/latest.json"
    latest.write_text(json.dumps({"folder": "step-2", "values": {"step": 2}}))
    got = read_checkpoint(tmp_path)
    assert got is not None and got[1]["step"] == 3 and got[0]["a"].tolist() == [1, 1]
    latest.write_text(json.dumps({"folder": "step-2", "values": {"step": 4}}))
    with pytest.raises(UserError, match="step-2 is corrupt"):
        read_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_stays_whole_until_the_next_one_of_the_same_step_is(tmp_path: Path) -> None:
    """After a rollback to the newest checkpoint its step is written again."""
    world, many = Alone(size=2), tmp_path / "checkpoint"
    for value, name in ((1.0, "step-2"), (2.0, "step-2-again"), (3.0, "step-2")):
        write_checkpoint(tmp_path, {"a": torch.full((2,), value)}, {"step": 2}, world)
        assert [path.name for path in many.glob("step-*")] == [name]
        got = read_checkpoint(tmp_path)
        assert got is not None and got[0]["a"].tolist() == [value, value]
    part = next((many / "step-2").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match=r"step-2 is corrupt .*; delete .*checkpoint and run the stage again"):
        read_checkpoint(tmp_path)
    shutil.rmtree(many)
    many.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"step-3 cannot be written \(.*; see to it and run the stage again"):
        write_checkpoint(tmp_path, {"a": torch.ones(2)}, {"step": 3}, world)


def gradient(scale: Scale, net: Supernet | None = None) -> Tensor:
    """Of a batch of 9 images, one process."""
    module = net or worker.net()
    module.zero_grad()

    def losses(x: Tensor, y: Tensor, add: Add) -> Tensor:
        found = [F.cross_entropy(module(x, arch), y) for arch in worker.ENDS]
        add(sum(found[1:], found[0]) / 2)
        return found[0]

    gradients = Gradients(module, worker.BATCH, scale)
    loss = gradients.of(losses, *worker.images())
    with torch.no_grad():
        x, y = worker.images()
        assert loss == pytest.approx(F.cross_entropy(module(x, worker.ENDS[0]), y).item(), rel=0.02)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    gradients.precision.unscale(optimizer)
    return worker.flat(module)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_batch_in_parts_has_the_gradient_of_the_batch(parts: int) -> None:
    assert worker.apart(gradient(Scale(accumulate=parts)), worker.truth()) < 1e-5


@pytest.mark.parametrize(("name", "least", "most"), [("bfloat16", 1e-2, 0.25), ("float16", 1e-3, 0.08)])
def test_half_precision_has_nearly_the_same_gradient(name: str, least: float, most: float) -> None:
    assert least < worker.apart(gradient(Scale(precision=name)), worker.truth()) < most


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    precision, optimizer = Precision("float16", torch.device("cpu")), torch.optim.SGD([weight], lr=1.0)
    before = precision.scaler.get_scale()
    precision.backward(weight.sum() * float("inf"))
    precision.unscale(optimizer)
    precision.step(optimizer)
    assert weight.item() == 1 and precision.scaler.get_scale() == before / 2
    other = Precision("float16", torch.device("cpu"))
    other.restore(precision.state())
    assert other.scaler.get_scale() == before / 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradient(backend: str) -> None:
    net = worker.net()
    compile_blocks(net, backend=backend)
    assert worker.apart(gradient(Scale(), net), worker.truth()) < 1e-5
    assert list(net.state_dict()) == list(worker.net().state_dict())


def test_shares_of_a_batch_are_the_batch() -> None:
    data = digits()

    def batch(share: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return next(data.batches("train", 7, 8, rng=np.random.default_rng(0), share=share))

    x, y = batch((0, 1))
    for rank in range(3):
        part, labels = batch((rank, 3))
        assert torch.equal(part, x[rank::3]) and torch.equal(labels, y[rank::3])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Scale(accumulate=0).check(8), "accumulate is 0"),
        (lambda: Scale(World(0, 4), accumulate=4).check(17), "raise batch_size"),
        (lambda: Parallel("zip"), "choose from none, fp16, powersgd"),
        (lambda: Parallel("powersgd", start=1), "start 2"),
        (lambda: Precision("int8", torch.device("cpu")), "choose from float32"),
    ],
)
def test_wrong_settings_are_explained(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_more_processes_than_gpus_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes on 1 GPUs"), processes("cuda"):
        pass


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("tpu", "device 'tpu' is not known; give cpu, cuda"),
        ("cuda", "PyTorch finds no GPU for device 'cuda'; give cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=words), processes(device):
        pass


def worker_id(parent: int, rank: int) -> int:
    """The process that torchrun (`parent`) started for a rank; 0 while there is none."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            mine = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if mine and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except OSError:
            continue
    return 0


@pytest.mark.slow
def test_a_worker_killed_under_max_restarts_resumes_and_ends_as_an_uninterrupted_run(tmp_path: Path) -> None:
    options = ["schedule.epochs=2", "train.watch.images=60", "train.watch.calibration=60", "train.save_seconds=1"]

    def start(name: str, *flags: str) -> subprocess.Popen[str]:
        line = ["--standalone", *flags, "-m", "scripts.train", "experiment=digits", f"run={tmp_path / name}"]
        return torchrun(*line, "train.device=cpu", *options)

    killed = start("killed", "--max-restarts", "2")
    latest = tmp_path / "killed/train/checkpoint/latest.json"
    deadline = time.monotonic() + 200
    worker = 0
    for step in (6, 12):
        gone, worker = worker, 0
        while worker in (0, gone) or json.loads(latest.read_text())["values"]["step"] < step:
            assert killed.poll() is None, killed.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
            worker = worker_id(killed.pid, 1) if latest.exists() else 0
        os.kill(worker, signal.SIGKILL)
    output, _ = killed.communicate(timeout=200)
    assert killed.returncode == 0, output
    assert "Signal 9" in output or "-9" in output, "a worker must have died"
    whole = start("whole")
    output, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, output
    expected, got = (load_tensors(tmp_path / f"{name}/train/supernet.safetensors")[0] for name in ("whole", "killed"))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    logs = [(tmp_path / name / "train/log.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    epochs = [[json.loads(line)["epoch"] for line in log] for log in logs]
    assert epochs[0] == epochs[1]
