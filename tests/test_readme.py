"""What the README shows runs as written."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ofa.compress.prune import Pruning, prune
from ofa.export.onnx import export, verify
from ofa.extraction import extract
from ofa.liveness import peak_elements
from ofa.space import load_space
from ofa.static import build
from ofa.supernet import Supernet
from predictors import Macs, PeakMemory

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"\n\n((?: {4}.*\n|\n(?= {4}))+)", TEXT)]


@pytest.mark.parametrize("words", ["space.encode([Arch(", "run_search(Evolution("])
def test_python_lines_run(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in BLOCKS if words in block]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_a_network_is_made_small_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for block in BLOCKS if 'export(small, "net.onnx")' in block]
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(60):
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(f"photos/{name}/{i}.png")
    space = load_space("digits_mbv3").adapt(in_channels=3, classes=2)
    exec(compile(code, "README.md", "exec"), {"net": build(space, space.decode(space.largest())[0]).eval()})
    assert 0 < (tmp_path / "net.int8.onnx").stat().st_size < (tmp_path / "net.onnx").stat().st_size


def test_the_family_of_ones_own_is_a_family_like_any_other(tmp_path: Path) -> None:
    (text,) = [block for block in BLOCKS if "name: my_space" in block]
    content: dict[str, Any] = yaml.safe_load(text)
    space = load_space(content | {"resolution": [32, 48], "classes": 10})
    supernet = Supernet(space).eval()
    torch.nn.init.normal_(supernet.units[-1].linear.weight)  # type: ignore[union-attr, arg-type]
    genes = space.sample(6, np.random.default_rng(0))
    for i, arch in enumerate(space.decode(genes)):
        x, net = torch.randn(8, 3, arch.resolution, arch.resolution), extract(supernet, arch)
        torch.testing.assert_close(net(x), supernet(x, arch), rtol=1e-4, atol=1e-4)
        assert PeakMemory(space, "liveness")(genes)[i] == peak_elements(net, x[:1])
        small = prune(net, Pruning(0.8))
        export(small, tmp_path / "net.onnx")
        assert verify(tmp_path / "net.onnx", small, x).max_relative < 1e-4
    assert len(np.unique(Macs(space)(genes))) > 1
