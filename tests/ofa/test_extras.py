"""What needs an extra says which, and everything else runs without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ofa.compress.pt2e import Pt2e
from ofa.errors import UserError
from ofa.extras import extra, installed, require_packages


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("tflite_micro.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tflite_micro", None)
    for module in ("tflite_micro", "tflite_micro.python"):
        with pytest.raises(UserError, match=r'tflite_micro is not installed; .*pip install "ofa-nas\[tflite\]"'):
            extra(module, "tflite")
    assert not installed("no_such_package")
    assert extra("json.decoder", "none").JSONDecoder
    with pytest.raises(ModuleNotFoundError):
        extra("json.no_such_module", "none")


def test_a_part_is_refused_where_its_packages_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Pt2e()
    monkeypatch.setattr("ofa.compress.pt2e.PACKAGES", ("json", "no_such_package"))
    with pytest.raises(UserError, match=r'no_such_package is not installed; .*pip install "ofa-nas\[quant\]"'):
        require_packages(step)
    monkeypatch.setattr("ofa.compress.pt2e.PACKAGES", ("json",))
    require_packages(step)
    require_packages(object())


def test_onnx_runtime_reports_nothing(tmp_path: Path) -> None:
    code = """
import ofa, onnxruntime
from onnx import TensorProto, helper
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
print(onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": [1.0]}))
"""
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], check=True, env=kept | home)
    assert not list(tmp_path.iterdir())
