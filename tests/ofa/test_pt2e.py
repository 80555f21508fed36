"""PT2E: what it inserts is counted, it stays close to the float network, its ONNX file computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx, nn

from ofa.compress.chain import Work
from ofa.compress.pt2e import Pt2e, count_nodes, export_onnx, prepare, quantizer
from ofa.data import digits
from ofa.errors import UserError
from ofa.export.onnx import compare, load_onnx, run_onnx, run_torch
from ofa.finetune import Finetuning, finetune
from tests.ofa.nets import random_net

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = 19  # convolutions, those of squeeze-excite and the linear layer


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    return Pt2e("ptq", images=64)(random_net(), Work(digits(), 16))


def test_every_layer_reads_integers_and_the_logits_stay_close(quantized: nn.Module) -> None:
    assert isinstance(quantized, fx.GraphModule)
    counts = count_nodes(quantized)
    assert counts["layers"] == LAYERS
    assert counts["quantize"] > LAYERS / 2 and counts["dequantize"] >= 2 * LAYERS
    images = next(digits().batches("test", 64, 16, rng=None))[0]
    parity = compare(run_torch(quantized, images), run_torch(random_net(), images))  # type: ignore[arg-type]
    assert 10 < parity.sqnr_db < 60, "close, and not the float network itself"


def test_a_conversion_that_inserts_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fx.symbolic_trace(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    with pytest.raises(RuntimeError, match="left 0 of 0 layers in float"):
        count_nodes(plain)
    exported = torch.export.export(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (torch.zeros(2, 4),)).module()
    with pytest.raises(RuntimeError, match="left 1 of 1 layers in float"):
        count_nodes(exported)  # type: ignore[arg-type]
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    with pytest.raises(RuntimeError, match=r"torchao inserted no observer; it needs torch 2\.13 or newer"):
        prepare(random_net(), torch.zeros(2, 1, 16, 16), X86InductorQuantizer())
    assert quantizer() is not None


def test_the_onnx_file_has_the_pairs_and_computes_the_same(quantized: nn.Module, tmp_path: Path) -> None:
    counts = export_onnx(quantized, tmp_path / "net.onnx", (1, 16, 16))
    assert counts["QuantizeLinear"] > 0 and counts["DequantizeLinear"] >= 2 * LAYERS
    assert load_onnx(tmp_path / "net.onnx").opset_import[0].version >= 17
    images = next(digits().batches("test", 64, 16, rng=None))[0]
    expected = run_torch(random_net(), images)
    eager = compare(run_torch(quantized, images), expected).sqnr_db  # type: ignore[arg-type]
    assert abs(compare(run_onnx(tmp_path / "net.onnx", images), expected).sqnr_db - eager) < 3, "as close to float"
    assert compare(run_onnx(tmp_path / "net.onnx", images), run_torch(quantized, images)).sqnr_db > 12  # type: ignore[arg-type]


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="mode 'awq' is not known"):
        Pt2e("awq")
    with pytest.raises(UserError, match="images 0 must be at least 1"):
        Pt2e(images=0)


@pytest.mark.slow
def test_training_with_rounding_in_place_converts(tmp_path: Path) -> None:
    net = finetune(random_net(), digits(), Finetuning(epochs=4, lr=0.1))  # rounding is learned from a trained network
    before = {name: value.clone() for name, value in net.state_dict().items()}
    step = Pt2e("qat", finetuning=Finetuning(epochs=1, lr=0.005))
    trained = step(net, Work(digits(), 16))
    assert count_nodes(trained)["layers"] == LAYERS  # type: ignore[arg-type]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items()), "the net is left as it is"
    x, y = next(digits().batches("test", 300, 16, rng=None))
    assert (trained(x).argmax(1) == y).float().mean() > 0.85
    assert export_onnx(trained, tmp_path / "net.onnx", (1, 16, 16))["QuantizeLinear"] > 0
