"""The proof that a network fits a device: rows, explanations, refusal; arenas in the real TFLM interpreter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module

import scripts.export
from ofa import processor
from ofa.data import digits
from ofa.errors import UserError
from ofa.export import MICRO_RUNTIMES, budget
from ofa.export.budget import OverBudgetError, Proof, Row, explain, is_met, prove, require
from ofa.export.c.build import has_compiler
from ofa.export.flatbuffer import Peak
from ofa.files import read_json
from scripts.onnx_files import budget_of
from tests.ofa.nets import random_net

FITS = Proof("tflm", (Row("peak_memory_bytes", 90, 100, "measured"),))
OVER = Proof("c", (Row("peak_memory_bytes", 101, 100, "measured"), Row("macs", 5, 10, "exact")))


def test_the_names_of_the_runtimes_are_those_that_are_proven() -> None:
    assert tuple(budget.MICRO) == MICRO_RUNTIMES


def test_a_device_takes_what_fits_in_one_of_its_runtimes() -> None:
    assert FITS.met and not OVER.met
    assert is_met([FITS, OVER], [{"met": False}])
    assert not is_met([OVER], [{"met": True}])
    assert is_met([], [{"met": True}]) and not is_met([], [{"met": True}, {"met": False}])


def test_what_exceeds_a_device_is_refused_unless_forced() -> None:
    assert not require("board", [FITS], [], force=False)
    with pytest.raises(OverBudgetError, match=r"board: not deployable, c peak_memory_bytes 101 > 100; .*force=true"):
        require("board", [OVER], [], force=False)
    assert require("board", [OVER], [], force=True).startswith("board: accepted by force=true, ")
    rows = [{"limit": "macs", "value": 11, "max": 10, "met": False}]
    with pytest.raises(OverBudgetError, match="int8 macs 11 > 10"):
        require("board", [], rows, force=False)


def test_a_latency_over_its_limit_names_the_machine_that_it_was_measured_on() -> None:
    rows = budget_of({"latency_ms": 4.0, "macs": 10}, {"latency_ms": 5.0, "macs": 5})
    late = Proof("c", (Row("latency_ms", 5.0, 4.0, "measured"),))
    for proofs, name in (([], "int8"), ([late], "c")):
        told = f"board: not deployable, {name} latency_ms 5 > 4 (ONNX Runtime on {processor.name()}); "
        with pytest.raises(OverBudgetError, match=re.escape(told)):
            require("board", proofs, rows, force=False)


def test_an_accuracy_must_be_at_least_its_limit() -> None:
    good, bad = Row("accuracy", 0.98, 0.9, "measured"), Row("accuracy", 0.85, 0.9, "measured")
    assert good.met and not bad.met
    assert Proof("c", (good,)).lines() == ["c: accuracy 0.98 of 0.9, met (measured)"]
    with pytest.raises(OverBudgetError, match=r"c accuracy 0.85 < 0.9"):
        require("board", [Proof("c", (bad,))], [], force=False)
    assert [row["met"] for row in budget_of({"accuracy": 0.9, "macs": 5}, {"accuracy": 0.95, "macs": 6})] == [
        True,
        False,
    ]


def test_a_difference_above_ten_percent_is_explained_in_numbers() -> None:
    fullest = Peak(900, "PAD", 6, (500, 400))
    assert explain(1000, 1000, 99, fullest) == ["arena 1,099 bytes, +10% of the predicted 1,000"]
    assert explain(1000, 900, 99, fullest, 50)[1] == "of it 50 are needed before the first inference alone, for plans"
    text = " ".join(explain(1000, 1000, 400, fullest))
    assert "1,400 bytes, +40% of the predicted 1,000" in text
    assert "400 are the interpreter's own tables" in text
    assert "900 are tensors alive at once at operator 6 (PAD): 500, 400; 100 more" in text


def test_a_runtime_that_refuses_a_network_leaves_it_to_another(monkeypatch: Any, tmp_path: Path) -> None:
    def refuse(*_: object) -> Proof:
        raise UserError("it has an operator too many; leave it out")

    monkeypatch.setitem(budget.MICRO, "tflm", (refuse, "sys", "nothing"))
    net, images = random_net(), torch.randn(8, 1, 16, 16)
    exact = {"macs": 1.0, "peak_memory_bytes": 1e4}
    proofs, missing = prove(["tflm", "c"], net, images, {"macs": 2.0}, exact, tmp_path)
    assert [proof.runtime for proof in proofs] == ["c"]
    assert missing == ["tflm: not measured; it has an operator too many; leave it out"]
    exact |= {"params": 1.0, "latency_ms": 1.0}
    (proof,), _ = prove(["c"], net, images, {"macs": 2.0, "params": 2.0, "latency_ms": 2.0}, exact, tmp_path)
    other = "of the ONNX file in ONNX Runtime on this machine, not of this runtime"
    assert [row.source for row in proof.rows] == ["exact", "exact", other]
    with pytest.raises(UserError, match="an operator too many"):
        prove(["tflm"], net, images, {"macs": 2.0}, exact, tmp_path)


def test_without_the_extra_the_proof_says_which_one_is_missing(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(budget, "installed", lambda module: False)
    proofs, missing = prove(["tflm"], random_net(), torch.zeros(1, 1, 16, 16), {}, {}, tmp_path)
    assert proofs == []
    assert missing == ['tflm: not measured; pip install "ofa-nas[tflite]" for the arena of TensorFlow Lite Micro']
    with pytest.raises(UserError, match="device runtime 'forth' is not known; choose from tflm, c"):
        prove(["forth"], random_net(), torch.zeros(1, 1, 16, 16), {}, {}, tmp_path)


@pytest.mark.skipif(not (has_compiler("gcc") and has_compiler()), reason="there is no arm-none-eabi-gcc")
def test_a_network_without_a_run_is_proven_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = ["network=digits_mbv3/smallest", f"run={tmp_path}", "device=stm32l073", "export.images=50"]
    options = [*card, "export.repeats=5", "compress.quantization.images=32"]
    with initialize_config_module("conf", version_base="1.3"):
        fits = compose("config", options)
        tight = compose("config", [*options, "device.stm32l073.limits.weight_bytes=15KB", "restart=true"])
        forced = compose("config", [*options, "device.stm32l073.limits.weight_bytes=15KB", "force=true"])
    scripts.export.main(fits)
    out = capsys.readouterr().out
    assert "random ones stand in" in out and "compiled for cortex-m0plus" in out and "budget met" in out
    result = read_json(tmp_path / "prove/digits_mbv3-smallest/stm32l073/result.json")
    proof = result["proofs"]["c"]
    assert proof["met"] and [row["limit"] for row in proof["rows"]] == ["peak_memory_bytes", "weight_bytes", "macs"]
    assert "accuracy" not in result["models"]["int8"]
    with pytest.raises(OverBudgetError, match=r"stm32l073: not deployable, c weight_bytes \d+ > 15000; .*force=true"):
        scripts.export.main(tight)
    scripts.export.main(forced)


@pytest.mark.filterwarnings("ignore")
def test_the_arena_decides_whether_a_network_fits(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    images = torch.cat(list(digits().calibration("val", 32, 16)))
    exact = {"peak_memory_bytes": 8000, "macs": 1e6}
    limits = {"peak_memory_bytes": 320_000, "weight_bytes": 1_000_000, "macs": 7e6}
    ((proof,), _) = prove(["tflm"], random_net(), images, limits, exact, tmp_path)
    assert proof.met
    arena, flash, macs = (row.value for row in proof.rows)
    assert (flash, macs) == ((tmp_path / "tflm.int8.tflite").stat().st_size, 1e6)
    assert sum(p.numel() for p in random_net().parameters()) < flash < 320_000
    assert 8000 < arena < 320_000
    assert not Proof("tflm", (Row("peak_memory_bytes", arena, arena - 1, ""),)).met
    assert Proof("tflm", (Row("peak_memory_bytes", arena, arena, ""),)).met
