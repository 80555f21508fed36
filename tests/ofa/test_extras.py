"""What needs an extra says which, and everything else runs without."""

from __future__ import annotations

import sys

import pytest

from ofa.errors import UserError
from ofa.extras import extra, installed


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
