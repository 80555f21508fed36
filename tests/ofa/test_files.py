"""Files are written whole or not at all; damage is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from ofa.errors import UserError
from ofa.files import append_jsonl, atomic_write, read_json, read_jsonl, write_json
from ofa.weights import load_tensors, load_weights, save_tensors


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_torn_last_line_is_dropped_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    assert read_jsonl(path) == [{"a": 1}]
    append_jsonl(path, {"a": 3})
    assert read_jsonl(path) == [{"a": 1}, {"a": 3}]


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "big"
    loop = f"while True:\n for c in b'ab': atomic_write({str(path)!r}, bytes([c]) * 10**6)"
    code = f"from ofa.files import atomic_write\n{loop}"
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", code])
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = path.read_bytes()
        assert content in (b"a" * 10**6, b"b" * 10**6)


def test_what_a_killed_writer_left_is_swept_when_it_is_old(tmp_path: Path) -> None:
    left, fresh, other = (tmp_path / name for name in (".big.0aZ_9xyz", ".big.1aZ_9xyz", ".bigger.0aZ_9xyz"))
    for path in (left, fresh, other):
        path.write_bytes(b"half")
    for path in (left, other):
        os.utime(path, (0, 0))
    atomic_write(tmp_path / "big", b"whole")
    assert {entry.name for entry in tmp_path.iterdir()} == {"big", fresh.name, other.name}


def test_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "big"
    code = "import sys; from ofa.files import atomic_write\n"
    code += f"for _ in range(50): atomic_write({str(path)!r}, sys.argv[1].encode() * 10**5)"
    writers = [subprocess.Popen([sys.executable, "-c", code, letter]) for letter in "abc"]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 10**5 and len(set(content)) == 1
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["big"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    atomic_write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_weights_survive_and_damage_is_named(tmp_path: Path) -> None:
    path, net = tmp_path / "net.safetensors", nn.Linear(3, 2)
    save_tensors(path, net.state_dict(), {"step": 3, "name": "x"})
    tensors, metadata = load_tensors(path)
    assert metadata == {"step": 3, "name": "x"}
    assert torch.equal(tensors["weight"], net.weight)
    for damaged in (path.read_bytes()[:-5], b"", path.read_bytes()[4:]):
        (tmp_path / "bad.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=r"bad\.safetensors is corrupt"):
            load_tensors(tmp_path / "bad.safetensors")


def test_weights_that_are_no_finite_floats_are_refused_whole() -> None:
    net = nn.Linear(3, 2)
    before = net.weight.clone()
    for wrong in (torch.full((2, 3), torch.nan), torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 3) + 1j):
        with pytest.raises(UserError, match="file has values in weight that are no finite floats"):
            load_weights(net, {"weight": wrong, "bias": torch.ones(2)}, "file")
    assert torch.equal(net.weight, before)


def test_weights_of_another_network_are_refused_whole(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for other in (nn.Linear(3, 3), nn.Linear(3, 2, bias=False), nn.Conv2d(3, 2, 1)):
        with pytest.raises(UserError, match="does not fit"):
            load_weights(net, other.state_dict(), "file")
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
