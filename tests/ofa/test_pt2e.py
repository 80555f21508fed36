"""PT2E: what it inserts is counted, it stays close to the float network, and its plain layers and ONNX file as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.models import resnet18

from ofa.compress.chain import Work, compress
from ofa.compress.fold import fold_batch_norms
from ofa.compress.layers import weight_layers
from ofa.compress.norms import Norms
from ofa.compress.numbers import measure
from ofa.compress.pt2e import Pt2e, count_nodes, plain_layers, prepare, quantize, quantizer
from ofa.compress.quantize import check_quantized
from ofa.data import digits
from ofa.errors import UserError
from ofa.export.graph import onnx_model
from ofa.export.onnx import compare, run_onnx, run_torch
from ofa.files import atomic_write
from ofa.finetune import Finetuning, finetune
from ofa.space import Space
from ofa.static import build
from tests.ofa.nets import random_net

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = 19  # convolutions, those of squeeze-excite and the linear layer


@pytest.fixture(scope="module")
def quantized() -> fx.GraphModule:
    return quantize(random_net(), digits().calibration("val", 64, 16), quantizer())


def test_every_layer_reads_integers_and_the_logits_stay_close(quantized: fx.GraphModule) -> None:
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


def test_the_step_leaves_plain_layers_that_compute_what_the_graph_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8, bias=False)]
    net = nn.Sequential(*convs, nn.BatchNorm2d(16), nn.Hardswish(), nn.Flatten(), nn.Linear(16 * 14 * 14, 10)).eval()
    nn.init.uniform_(net[1].running_var, 0.5, 2)  # type: ignore[arg-type]
    work = Work(digits(), 16)
    plain = Pt2e("ptq", images=64)(net, work)
    graph = quantize(net, work.data.calibration("val", 64, 16), quantizer())
    images = next(digits().batches("test", 64, 16, rng=None))[0]
    assert compare(run_torch(plain, images), run_torch(graph, images)).sqnr_db > 60, (
        "but for what rounds to even or odd"
    )
    assert compare(run_torch(plain, images), run_torch(net, images)).sqnr_db < 40
    plain[0].input_grid.scale *= 1.05  # type: ignore[union-attr, operator]
    assert compare(run_torch(plain, images), run_torch(graph, images)).sqnr_db < 40


def test_training_keeps_each_layer_its_own_weights_where_a_shortcut_has_a_convolution() -> None:
    stages = [{"block": "bottleneck", "channels": 32, "stride": 1, "depth": 1, "expand": 0.5}]
    stem = [{"kind": "conv", "channels": 16, "kernel": 3, "stride": 2, "act": "relu"}]
    head = [{"kind": "pool"}, {"kind": "linear"}]
    space = Space("b", [16], in_channels=1, classes=10, stem=stem, stages=stages, head=head)
    torch.manual_seed(0)
    net = build(space, space.decode(space.largest())[0]).eval()
    trained = Pt2e("qat", finetuning=Finetuning(epochs=0.1, lr=0.001))(net, Work(digits(), 16))
    made, given = weight_layers(trained), weight_layers(fold_batch_norms(net))
    cosines = {name: F.cosine_similarity(made[name].weight.flatten(), given[name].weight.flatten(), 0) for name in made}
    assert all(hasattr(layer, "weight_scale") for layer in made.values())
    assert min(cosines.values()) > 0.9, cosines


def test_pruned_weights_stay_zero_while_training_with_rounding_in_place() -> None:
    net = random_net()
    zero = torch.zeros_like(net.units[4].project.conv.weight, dtype=torch.bool)
    zero[:, ::2] = True
    net.units[4].project.conv.weight.data[zero] = 0
    trained = Pt2e("qat", finetuning=Finetuning(epochs=0.1, lr=0.01))(net, Work(digits(), 16))
    weight = weight_layers(trained)["units.4.project.conv"].weight
    assert not weight[zero].any() and weight[~zero].any()


def test_the_step_is_measured_and_followed_by_others(tmp_path: Path) -> None:
    chain = compress(random_net(), {"pt2e": Pt2e("ptq", images=64), "norms": Norms()}, work := Work(digits(), 16))
    for name, made in chain:
        found = measure(name, made, work, tmp_path / f"{name}.ofap")
        assert found.bit_operations == 64 * found.macs
        assert found.file_bytes < 1.5 * found.parameters, "one byte a weight"


def test_the_step_is_written_with_the_grids_of_the_graph(quantized: fx.GraphModule, tmp_path: Path) -> None:
    plain = plain_layers(quantized, random_net(), torch.zeros(1, 1, 16, 16))
    model = onnx_model(plain, (1, 16, 16), grids=True)
    assert check_quantized(model)["QuantizeLinear"] == LAYERS
    atomic_write(tmp_path / "net.onnx", model.SerializeToString())
    images = next(digits().batches("test", 64, 16, rng=None))[0]
    expected = run_torch(random_net(), images)
    eager = compare(run_torch(quantized, images), expected).sqnr_db  # type: ignore[arg-type]
    assert abs(compare(run_onnx(tmp_path / "net.onnx", images), expected).sqnr_db - eager) < 3, "as close to float"


def test_a_network_that_torchao_does_not_take_apart_is_named() -> None:
    with pytest.raises(UserError, match=r"torchao cannot quantize ResNet \(.*\); take step=int8"):
        quantize(resnet18(num_classes=10).eval(), [torch.randn(4, 3, 32, 32)], quantizer())


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="mode 'awq' is not known"):
        Pt2e("awq")
    with pytest.raises(UserError, match="images 0 must be at least 1"):
        Pt2e(images=0)


@pytest.mark.slow
def test_training_with_rounding_in_place_converts() -> None:
    net = finetune(random_net(), digits(), Finetuning(epochs=4, lr=0.1))  # rounding is learned from a trained network
    before = {name: value.clone() for name, value in net.state_dict().items()}
    step = Pt2e("qat", finetuning=Finetuning(epochs=1, lr=0.005))
    trained = step(net, Work(digits(), 16))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items()), "the net is left as it is"
    x, y = next(digits().batches("test", 300, 16, rng=None))
    assert (trained(x).argmax(1) == y).float().mean() > 0.85
    assert trained.units[0].conv.weight_scale.numel() == 16  # type: ignore[union-attr]
