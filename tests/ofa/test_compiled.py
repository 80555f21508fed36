"""ExecuTorch programs and AOTInductor packages: the same logits, from C++ too; broken files are named."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ofa.compress.affine import without_grids
from ofa.compress.linear import Linear, quantize_linear
from ofa.data import digits
from ofa.errors import UserError
from ofa.export.onnx import compare, run_torch
from ofa.export.runtime import run
from ofa.export.runtimes import executorch
from ofa.export.runtimes.aoti import SOURCES, Aoti, write_cpp
from ofa.export.runtimes.executorch import ExecuTorch
from ofa.finetune import Finetuning, finetune
from tests.ofa.nets import random_net

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return next(digits().batches("test", 64, 16, rng=None))[0]


@pytest.mark.parametrize("runtime", [Aoti(), ExecuTorch()])
@pytest.mark.parametrize("content", [b"", b"hello", b"\0\0\0\0ET12" + b"\xff" * 200])
def test_a_damaged_file_is_named(runtime: Aoti | ExecuTorch, content: bytes, tmp_path: Path) -> None:
    if isinstance(runtime, ExecuTorch):
        pytest.importorskip("executorch")
    (tmp_path / "net.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"net\.bin is no usable .*export it again"):
        runtime.load(tmp_path / "net.bin")
    with pytest.raises(UserError, match=r"none\.bin does not exist"):
        runtime.load(tmp_path / "none.bin")


def test_the_pool_of_a_process_has_one_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch, "_pool", [2])
    executorch.restrict(2)
    with pytest.raises(UserError, match="ExecuTorch has 2 threads in this process; start another one for 1"):
        executorch.restrict(1)


def test_the_program_in_cpp_is_written_whole(tmp_path: Path) -> None:
    assert [file.name for file in write_cpp(tmp_path / "cpp")] == list(SOURCES)
    text = (tmp_path / "cpp/main.cpp").read_text()
    assert "AOTIModelPackageLoader" in text and "torch/script.h" not in text


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
def test_an_executorch_program_follows_the_network(bits: int, images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    runtime, file = ExecuTorch(bits), tmp_path / "net.pte"
    net = finetune(random_net(), digits(), Finetuning(epochs=4, lr=0.1))
    runtime.export(net, file, torch.cat(list(digits().calibration("val", 64, 16))))
    parity = compare(run(runtime, file, images), run_torch(net, images))
    assert parity.sqnr_db > (15 if bits == 8 else 80)
    found = runtime.describe(file)
    assert found["planned_bytes"] > 0 and "not the peak" in found["planned_note"]
    assert found["delegates"] == ["XnnpackBackend"], "all of it"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(UserError, match="export it again"):
        runtime.load(file)(images[:1].numpy())


@pytest.mark.slow
def test_int8_leaves_grids_of_activations_out(images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("executorch")
    net, file = quantize_linear(random_net(), Linear(activation_bits=3), [images]), tmp_path / "net.pte"
    ExecuTorch().export(net, file, images)
    assert compare(run(ExecuTorch(), file, images), run_torch(without_grids(net), images)).sqnr_db > 12
    assert "int8 ExecuTorch leaves out the grids of what 19 layers read" in caplog.text


@pytest.mark.slow
def test_a_package_gives_equal_logits_from_python_and_from_cpp(images: Tensor, tmp_path: Path) -> None:
    net, file = random_net(), tmp_path / "net.pt2"
    Aoti().export(net, file, images)
    expected = run_torch(net, images)
    again = run(Aoti(), file, images, batch=64)
    assert compare(again, expected).max_relative < 1e-5
    np.testing.assert_allclose(run(Aoti(), file, images[:3], batch=1), again[:3], rtol=1e-4, atol=1e-4)
    place = Path(torch.__file__).parent
    lines = [["make", f"TORCH={place}"]]
    if shutil.which("cmake"):
        lines += [
            ["cmake", "-B", "build", f"-DTORCH={place}"],
            ["cmake", "--build", "build"],
            ["mv", "build/run", "run"],
        ]
    for line in lines:
        subprocess.run(line, cwd=tmp_path / "cpp", check=True, capture_output=True)
    (tmp_path / "images.bin").write_bytes(images.contiguous().numpy().tobytes())
    line = ["cpp/run", "net.pt2", "images.bin", "1", "16", "16", "logits.bin", "3"]
    told = subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert len(told.split()) == 3 and all(float(ms) > 0 for ms in told.split())
    found = np.frombuffer((tmp_path / "logits.bin").read_bytes(), np.float32).reshape(again.shape)
    np.testing.assert_array_equal(found, again)
    line[2] = "cpp/Makefile"
    wrong = subprocess.run(line, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert wrong.returncode == 1 and "no number of images" in wrong.stderr


class Sorted(nn.Module):
    """An operator that XNNPACK and portable kernels lack."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x.mean(1))


@pytest.mark.slow
def test_an_unsupported_operator_is_named(images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    with pytest.raises(UserError, match="ExecuTorch cannot take this network"):
        ExecuTorch(32).export(Sorted(), tmp_path / "net.pte", images)
