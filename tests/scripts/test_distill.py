"""ofa-distill: students and teachers by name, what it writes, and mistakes that leave nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from PIL import Image
from torch import nn
from torchvision.models import get_model

from ofa.data import digits
from ofa.data.images import ImageData, Split
from ofa.distill.nets import load_net, require_images
from ofa.errors import UserError
from ofa.evaluate import accuracy, specialise
from ofa.export.card import Card, load_card, rebuild, save_net
from ofa.space import Arch, load_space
from ofa.supernet import Supernet
from ofa.weights import save_tensors
from scripts.distill import main
from tests.ofa.nets import RESNET, SPEC, random_net

SHORT = ("finetune.epochs=0.25", "finetune.batch_size=32")


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_module("conf", version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "net.json"
    save_net(path, random_net(RESNET), Card(Arch(16), {}, RESNET, {}, {}, 0))
    return path


def images(channels: int, classes: int) -> ImageData:
    split = Split(torch.randint(256, (60, channels, 16, 16), dtype=torch.uint8), torch.arange(60) % classes)
    names = tuple(map(str, range(classes)))
    return ImageData("random", names, split, split, split, (0.5,) * channels, (0.3,) * channels)


def distil(folder: Path, *options: str) -> None:
    main(compose("config", [f"run={folder}", *SHORT, *options]))


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_card_a_space_and_torchvision_name_networks(teacher: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 1, 16, 16)
    card = load_net(str(teacher), images(1, 10))
    assert card.learned and torch.equal(card.net(x), random_net(RESNET)(x))
    small = load_net("digits_mbv3/smallest", images(1, 7))
    assert small.arch == small.space.decode(small.space.smallest())[0] and small.net.spec.classes == 7
    (tmp_path / "arch.json").write_text(json.dumps({"arch": small.arch.to_dict()}))
    assert load_net(f"digits_mbv3/{tmp_path}/arch.json", images(1, 7)).net.spec == small.net.spec
    (tmp_path / "own.yaml").write_text((Path(str(files("conf"))) / "space" / "digits_mbv3.yaml").read_text())
    for choice in ("smallest", f"{tmp_path}/arch.json"):
        own = load_net(f"{tmp_path}/own.yaml/{choice}", images(1, 7))
        assert own.net.spec == small.net.spec and own.space == small.space
    for name in ("squeezenet1_1", "torchvision:squeezenet1_1"):
        fresh = load_net(name, images(3, 5))
        assert not fresh.learned and fresh.net(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("name", ["digits_mbv3", "cifar_pool"])
@pytest.mark.parametrize("choice", ["smallest", "largest"])
def test_weights_of_a_supernet_give_the_network_that_is_cut_out_of_it(name: str, choice: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = images(1, 7)
    space = load_space(name).adapt(in_channels=1, classes=7)
    space = space.restrict(resolution=[space.resolution[0]])
    supernet = Supernet(space).eval()
    save_tensors(tmp_path / "supernet.safetensors", supernet.state_dict())
    (tmp_path / "own.yaml").write_text(json.dumps(space.to_dict()))
    found = load_net(f"{tmp_path}/own.yaml/{choice}@{tmp_path}/supernet.safetensors", data)
    arch = space.decode(getattr(space, choice)())[0]
    expected = specialise(supernet, arch, data).state_dict()
    assert found.learned and found.arch == arch
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.net.state_dict().items())
    save_tensors(tmp_path / "net.safetensors", found.net.state_dict())
    again = load_net(f"{tmp_path}/own.yaml/{choice}@{tmp_path}/net.safetensors", images(1, 7)).net.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())
    with pytest.raises(UserError, match=r"supernet\.safetensors does not fit this network"):
        load_net(f"digits_mbv3/{choice}@{tmp_path}/supernet.safetensors", images(1, 8))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_follow_an_at_sign(suffix: str, tmp_path: Path) -> None:
    net, file = get_model("squeezenet1_1", num_classes=5).eval(), tmp_path / f"net.{suffix}"
    torch.save(net.state_dict(), file) if suffix == "pth" else save_tensors(file, net.state_dict())
    found, x = load_net(f"squeezenet1_1@{file}", images(3, 5)), torch.randn(1, 3, 64, 64)
    assert found.learned and torch.equal(found.net(x), net(x))
    assert torch.equal(load_net(f"squeezenet1_1@{file}", images(3, 6)).net(x), net(x)), "a teacher of other classes"
    student = load_net(f"squeezenet1_1@{file}", images(3, 6), adapt=True).net
    assert student(x).shape == (1, 6) and torch.equal(student.features(x), net.features(x))
    other = get_model("squeezenet1_0", num_classes=5).state_dict()
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(
        UserError, match=r"does not fit this network: .*other shape features\.0\.weight \(96, 3, 7, 7\) for"
    ):
        load_net(f"squeezenet1_1@{tmp_path}/other.pth", images(3, 5))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("resnet19", "network 'resnet19' is not known; give a card"),
        ("resnet18", "resnet18 takes images in colour, these have 1 channel"),
        ("none.json", "none.json does not exist; give a card"),
        ("own.yaml", "own.yaml is a space; give own.yaml/largest"),
        ("digits_mbv3/none.json", "none.json does not exist"),
        ("none.yaml/largest", "none.yaml cannot be read as a space .*; give a YAML file of conf/space's form"),
        ("digits_mbv3/smallest@none.pth", "none.pth does not exist"),
        ("digits_mbv3/smallest@DEFAULT", "checkpoint DEFAULT does not exist; give a file or a URL"),
    ],
)
def test_wrong_names_are_answered(name: str, answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        load_net(name, images(1, 10))


def test_weights_that_cannot_be_downloaded_are_answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refused(*_: object, **__: object) -> None:
        raise URLError("refused")

    monkeypatch.setattr("torch.hub.download_url_to_file", refused)
    with pytest.raises(
        UserError, match=r"weights of resnet18 cannot be downloaded \(<urlopen error refused>\); give resnet18@<file>"
    ):
        load_net("resnet18@DEFAULT", images(3, 10))


@pytest.mark.parametrize("weights", ["DEFAULT", "other.pth"])
def test_weights_for_a_card_are_refused_since_it_has_its_own(teacher: Path, weights: str) -> None:
    with pytest.raises(UserError, match=rf"net\.json is a card, which has weights of its own; leave out @{weights}"):
        load_net(f"{teacher}@{weights}", images(1, 10))


@pytest.mark.parametrize("content", ["[1, 2]", "3", '{"arch": 3}', '{"arch": ["a", 1]}'])
def test_a_file_that_is_no_architecture_is_answered(content: str, tmp_path: Path) -> None:
    (tmp_path / "arch.json").write_text(content)
    with pytest.raises(UserError, match="an architecture has the fields"):
        load_net(f"digits_mbv3/{tmp_path}/arch.json", images(1, 10))


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize(("name", "side"), [("googlenet", 32), ("inception_v3", 75)])
def test_a_network_with_further_classifiers_gives_logits_alone(name: str, side: int, tmp_path: Path) -> None:
    torch.save(get_model(name, num_classes=5).state_dict(), tmp_path / "theirs.pth")
    found = load_net(f"{name}@{tmp_path}/theirs.pth", images(3, 5))
    assert found.net.train()(torch.randn(2, 3, side, side)).shape == (2, 5)
    torch.save(found.net.state_dict(), tmp_path / "ours.pth")
    again = load_net(f"{name}@{tmp_path}/ours.pth", images(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(found.net.parameters(), again.net.parameters(), strict=True))
    with pytest.raises(UserError, match=r"it cannot take images of 8 x 8 pixels in 3 channels \(.*\); give larger"):
        require_images(found.net.eval(), "it", images(3, 5), 8)


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_student_of_a_space_learns_from_two_teachers_and_gets_a_card(teacher: Path, tmp_path: Path) -> None:
    other = shutil.copytree(teacher.parent, tmp_path / "other") / "net.json"
    distil(tmp_path / "run", "student=digits_mbv3/smallest", f"teacher=[{teacher},{other}]", "distill=relations")
    folder = tmp_path / "run/distill"
    card, net = load_card(folder / "student.json"), rebuild(folder / "student.json")
    assert load_space(card.space).encode([card.arch]).shape[0] == 1
    assert card.training["teacher"] == [str(teacher), str(other)]
    assert card.training["distill"]["losses"] == {"distances": 2.0, "angles": 4.0}
    scores = json.loads((folder / "result.json").read_text())["accuracy_val"]
    assert set(scores) == {"student", "teacher 0", "teacher 1"} and scores["teacher 0"] == scores["teacher 1"]
    assert scores["student"] == accuracy(net, digits(), "val", resolution=card.arch.resolution)
    assert card.metrics["accuracy_val"].value == scores["student"]
    assert not list(folder.glob("*state*"))


def test_what_is_printed_says_at_which_size_the_accuracies_are(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distil(tmp_path / "run", "student=digits_mbv3/smallest", f"teacher={teacher}")
    said = r"validation top-1 at 12 x 12 pixels: student \d+\.\d %, teacher \d+\.\d %; .*/student\.json"
    assert re.search(said, capsys.readouterr().out)


def test_a_network_with_another_first_layer_and_mutual_learning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distil(tmp_path, "student=digits_mbv3/smallest", "teacher=digits_mbv3/smallest", "distill=mutual")
    assert "student" in capsys.readouterr().out
    distil(tmp_path, "student=digits_mbv3/smallest", "teacher=digits_mbv3/smallest", "distill=mutual")
    assert "already done" in capsys.readouterr().out


def test_a_student_of_torchvision_is_written_as_weights_that_it_reads_again(teacher: Path, tmp_path: Path) -> None:
    from scripts.distill import _save

    found = load_net("squeezenet1_1", images(3, 5))
    file = _save(tmp_path, found, digits(), 0, 0.5, {})
    again = load_net(f"torchvision:squeezenet1_1@{file}", images(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(found.net.parameters(), again.net.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_googlenet_learns_from_googlenet_and_images_too_small_for_it_are_answered(tmp_path: Path) -> None:
    torch.save(get_model("googlenet", num_classes=2).state_dict(), tmp_path / "net.pth")
    for i in range(20):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(256, size=(32, 32, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    options = [
        "data=folder",
        f"data.path={tmp_path}/images",
        "student=googlenet",
        f"teacher=googlenet@{tmp_path}/net.pth",
    ]
    distil(tmp_path / "run", *options, "data.size=32", "finetune.batch_size=8")
    assert set(json.loads((tmp_path / "run/distill/result.json").read_text())["accuracy_val"]) == {
        "student",
        "teacher 0",
    }
    with pytest.raises(UserError, match="student googlenet cannot take images of 8 x 8 pixels"):
        distil(tmp_path / "small", *options, "data.size=8")
    with pytest.raises(UserError, match=r"teacher googlenet@.* cannot take images of 8 x 8 pixels"):
        distil(tmp_path / "small", *options, "data.size=8", "student=mobilenet_v3_small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["student=null"], "needs both; give student="),
        (["finetune.epochs=0"], "finetune.epochs=0 trains nothing"),
        (["teacher=digits_mbv3/largest"], "teacher digits_mbv3/largest has no weights; give .*distill=mutual"),
        (["student=unknown"], "network 'unknown' is not known"),
        (["student=3"], "network .3. is not known"),
        (["teacher=[3]"], "network .3. is not known"),
    ],
)
def test_a_mistake_leaves_no_folder(options: list[str], answer: str, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=answer):
        distil(tmp_path / "run", "student=digits_mbv3/smallest", f"teacher={teacher}", *options)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_classes_and_a_diverging_rate_are_answered(teacher: Path, tmp_path: Path) -> None:
    spec = replace(SPEC, units=(*SPEC.units[:-1], replace(SPEC.units[-1], cout=7)), classes=7)
    net: nn.Module = random_net(spec)
    save_net(tmp_path / "seven.json", net, Card(Arch(16), {}, spec, {}, {}, 0))  # type: ignore[arg-type]
    options = ["student=digits_mbv3/smallest"]
    with pytest.raises(UserError, match="the teacher has 7, the student 10; give a teacher of the same classes, or"):
        distil(tmp_path / "run", *options, f"teacher={tmp_path}/seven.json")
    distil(tmp_path / "moved", f"student={tmp_path}/seven.json", f"teacher={teacher}", "distill=relations")
    assert load_card(tmp_path / "moved/distill/student.json").spec.classes == 10
    distil(tmp_path / "relations", *options, f"teacher={tmp_path}/seven.json", "distill=relations")
    assert list(json.loads((tmp_path / "relations/distill/result.json").read_text())["accuracy_val"]) == ["student"]
    with pytest.raises(UserError, match=r"the loss is .* lower lr"):
        distil(tmp_path / "fast", *options, f"teacher={teacher}", "finetune.lr=1e12", "finetune.epochs=1")
    with pytest.raises(UserError, match=r"weights are not finite after step 1 .* lower lr"):
        distil(tmp_path / "last", *options, f"teacher={teacher}", "finetune.lr=1e45", "finetune.epochs=0.04")
    assert not list(tmp_path.glob("last/distill/student*"))
    assert load_card(teacher).spec == RESNET and rebuild(teacher)
