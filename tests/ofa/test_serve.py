"""The HTTP service: a real server on loopback, real images, limits, batching, a graceful stop, its manifest."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ofa.data import digits
from ofa.errors import UserError
from ofa.export.card import Card, save_card
from ofa.export.onnx import export, run_onnx
from ofa.serve.batching import Batcher
from ofa.serve.images import RefusedError, check
from ofa.serve.settings import Served, Settings
from ofa.space import load_space
from tests.ofa.nets import SPEC, random_net

ROOT = Path(__file__).parents[2]
PIXELS = digits().test.images[:8]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    export(random_net(), folder / "net.onnx")
    space = load_space("digits_mbv3")
    arch = space.decode(space.smallest())[0]
    save_card(folder / "net.json", Card(arch, {}, SPEC, {}, digits().describe(), seed=0), [folder / "net.onnx"])
    return folder / "net.json"


def png(pixels: Any) -> bytes:
    file = BytesIO()
    Image.fromarray(np.asarray(pixels)).save(file, "PNG")
    return file.getvalue()


# -- parts -------------------------------------------------------------------------------------------------------------


def test_what_waits_while_the_network_is_busy_runs_together() -> None:
    sizes: list[int] = []
    started = threading.Event()

    def work(items: Sequence[int]) -> list[int | Exception]:
        sizes.append(len(items))
        if len(sizes) == 1:
            started.wait(5)
        return [RefusedError(400, "odd") if item == 3 else 10 * item for item in items]

    async def use() -> list[int | BaseException]:
        async with Batcher(work, batch=4, waiting=6) as batcher:
            calls = [asyncio.create_task(batcher(0))]
            while not sizes:
                await asyncio.sleep(0.001)
            calls += [asyncio.create_task(batcher(i)) for i in range(1, 7)]
            await asyncio.sleep(0)
            with pytest.raises(RefusedError, match="6 images are waiting"):
                await batcher(7)
            started.set()
            return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(use())
    assert sizes == [1, 4, 2]
    assert [x for x in found if isinstance(x, int)] == [0, 10, 20, 40, 50, 60]
    assert isinstance(found[3], RefusedError), "an error reaches its own request alone"


def test_a_network_that_fails_answers_and_the_next_batch_runs() -> None:
    answers: list[list[int | Exception]] = [[1]]

    def work(items: Sequence[int]) -> list[int | Exception]:
        if items[0] == 0:
            raise RuntimeError("broken")
        return answers[0]

    async def use() -> int:
        async with Batcher(work, batch=1, waiting=1) as batcher:
            with pytest.raises(RuntimeError, match="broken"):
                await batcher(0)
            return await batcher(1)

    assert asyncio.run(use()) == 1


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"", 400), (b"hello", 415), (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, 415), (b"%PDF-1.4 ...", 415)],
)
def test_what_is_no_image_is_refused_by_its_head(content: bytes, status: int) -> None:
    with pytest.raises(RefusedError) as caught:
        check(content, 1000)
    assert caught.value.status == status


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded() -> None:
    bomb = BytesIO()
    Image.new("1", (6_000, 6_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 200_000
    with pytest.raises(RefusedError, match="pixels") as caught:
        check(bomb.getvalue(), 25_000_000)
    assert caught.value.status == 413
    check(png(np.zeros((30, 40), np.uint8)), 1200)
    with pytest.raises(RefusedError, match="40 x 30 pixels; at most 1199"):
        check(png(np.zeros((30, 40), np.uint8)), 1199)


def test_settings_and_models_are_checked(card: Path, tmp_path: Path) -> None:
    assert Settings("m").workers == len(os.sched_getaffinity(0))
    with pytest.raises(UserError, match=r"serve\.batch=0 must be a whole number, at least 1"):
        Settings("m", batch=0)
    with pytest.raises(UserError, match=r"serve\.port=99999 must be a whole number from 1 to 65535"):
        Settings("m", port=99999)
    found = Served.find(card.with_suffix(".onnx"))
    assert (found.file, found.resolution, len(found.classes)) == (card.with_suffix(".onnx"), 16, 10)
    with pytest.raises(UserError, match=r"none\.json does not exist; a model needs the card"):
        Served.find(tmp_path / "none.onnx")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="is no card"):
        Served.find(tmp_path / "list.json")
    with pytest.raises(UserError, match=r"net\.jsn is neither a card \(\.json\) nor an ONNX file"):
        Served.find(card.with_suffix(".jsn"))


def test_a_file_that_is_not_the_card_s_is_not_served(card: Path, tmp_path: Path) -> None:
    shutil.copy(card, tmp_path)
    (tmp_path / "net.onnx").write_bytes(card.with_suffix(".onnx").read_bytes() + b" ")
    with pytest.raises(UserError, match=r"net\.onnx is not the file that .*net\.json was written with"):
        Served.find(tmp_path / "net.json")


def test_weights_that_overflow_on_this_processor_are_told(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served.find(card)
    for bits, overflows in ((0, False), (7, False), (8, True)):
        for saturates in (False, True):
            monkeypatch.setattr("ofa.serve.settings.saturates", lambda found=saturates: found)
            assert bool(replace(served, weight_bits=bits).caution) == (overflows and saturates)


def test_the_manifest_is_valid_kubernetes() -> None:
    documents = list(yaml.safe_load_all((ROOT / "ofa/serve/kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Deployment", "Service", "HorizontalPodAutoscaler"]
    deployment, service, _ = documents
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents:
        validate.validate(document, "1.30", strict=True)
        with pytest.raises(validate.ValidationError):
            validate.validate(document | {"specs": {}}, "1.30", strict=True)


def test_the_dockerfile_names_what_the_project_has() -> None:
    """Without an engine: its instructions, and that command, extra, options, port and Python are this project's."""
    text = (ROOT / "ofa/serve/Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    known = {"FROM", "ARG", "COPY", "RUN", "USER", "WORKDIR", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    assert {name for name, _ in lines} == known and lines[0][0] == "FROM"
    given = dict(lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    program, model, host = json.loads(given["ENTRYPOINT"])
    assert program in project["scripts"]
    assert (model.partition("=")[0], host.partition("=")[0]) == ("model", "serve.host")
    assert "host" in Settings.__dataclass_fields__ and given["EXPOSE"] == str(Settings("m").port)
    health = json.loads(given["HEALTHCHECK"].partition("CMD ")[2])
    compile(health[2], "health", "exec")
    assert health[:2] == ["python", "-c"] and f"127.0.0.1:{given['EXPOSE']}/health" in health[2]
    assert "[serve]" in given["RUN"] and "serve" in project["optional-dependencies"]
    assert given["FROM"].startswith("python:3.11") and project["requires-python"] == ">=3.11"
    manifest = (ROOT / "ofa/serve/kubernetes.yaml").read_text()
    assert f"runAsUser: {given['USER']}" in manifest and f"containerPort: {given['EXPOSE']}" in manifest


# -- a server ----------------------------------------------------------------------------------------------------------


class Server:
    """One `ofa-serve` process."""

    def __init__(self, card: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        line = [sys.executable, str(ROOT / "scripts/serve.py"), f"model={card}", f"serve.port={self.port}", *options]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.send("GET", "/health")
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(self.stop())

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out

    def memory(self) -> int:
        """Most bytes that the process has held."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def server(card: Path) -> Iterator[Server]:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    server = Server(card, "serve.workers=1", "serve.max_bytes=100000")
    yield server
    if server.process.poll() is None:
        server.stop()


def test_images_get_the_classes_that_the_file_computes(server: Server, card: Path) -> None:
    expected = run_onnx(card.with_suffix(".onnx"), next(digits().batches("test", 8, 16, rng=None))[0])
    for pixels, logits in zip(PIXELS, expected, strict=True):
        status, content = server.send("POST", "/predict", png(pixels[0]))
        found = json.loads(content)
        shares = np.exp(logits - logits.max())
        assert (status, found["index"], found["class"]) == (200, logits.argmax(), digits().classes[logits.argmax()])
        assert found["probability"] == pytest.approx((shares / shares.sum()).max(), abs=1e-5)
        assert len(found["top"]) == 5


def test_what_is_too_large_broken_or_no_image_gets_a_4xx_and_little_memory(server: Server) -> None:
    before = server.memory()
    good = png(PIXELS[0, 0])
    assert server.send("POST", "/predict", good[: len(good) // 2])[0] == 400
    assert server.send("POST", "/predict", b"not an image at all")[0] == 415
    assert server.send("POST", "/predict", b"")[0] == 400
    for _ in range(5):
        assert _sent(server, b"\0" * 30_000_000) == 413
    chunks = (b"\0" * 100_000 for _ in range(300))
    assert _sent(server, chunks, **{"Transfer-Encoding": "chunked"}) == 413
    assert server.memory() < before + 20_000_000
    assert server.send("POST", "/predict", good)[0] == 200
    assert server.send("GET", "/predict")[0] == 405


def test_metrics_count_requests_and_batches(server: Server) -> None:
    server.send("POST", "/predict", png(PIXELS[0, 0]))
    server.send("POST", "/predict", b"no")
    status, text = server.send("GET", "/metrics")
    assert status == 200
    assert b'ofa_requests_total{status="200"}' in text
    assert b'ofa_requests_total{status="415"}' in text
    assert b"ofa_batch_images_bucket" in text
    assert json.loads(server.send("GET", "/health")[1])["status"] == "ok"


def test_a_client_that_leaves_in_the_middle_is_counted_and_nothing_else(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nhalf")
    deadline = time.monotonic() + 20
    while b'ofa_requests_total{status="499"} 1.0' not in server.send("GET", "/metrics")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.send("POST", "/predict", png(PIXELS[0, 0]))[0] == 200


def test_a_stopped_server_answers_what_is_open_first(server: Server) -> None:
    found: list[int] = []

    def slow() -> Iterator[bytes]:
        good = png(PIXELS[0, 0])
        yield good[:10]
        time.sleep(1.5)
        yield good[10:]

    thread = threading.Thread(target=lambda: found.append(_sent(server, slow(), **{"Transfer-Encoding": "chunked"})))
    thread.start()
    time.sleep(0.5)
    status, out = server.stop()
    thread.join(30)
    assert (status, found) == (0, [200])
    assert "Traceback" not in out
    assert f"next: curl --data-binary @<image> http://127.0.0.1:{server.port}/predict" in out
    with pytest.raises(ConnectionRefusedError):
        server.send("GET", "/health")


def test_an_address_that_cannot_be_had_is_answered_with_its_options(card: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host, reason in (("127.0.0.1", "Address already in use"), ("192.0.2.1", "Cannot assign requested address")):
            options = (f"model={card}", f"serve.host={host}", f"serve.port={port}")
            command = [sys.executable, "-m", "scripts.serve", *options]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            assert found.returncode == 1
            said = f"cannot listen at serve.host={host} serve.port={port}: {reason}; give another port or host"
            assert found.stderr == f"ofa-serve: {said}\n"


def test_bodies_that_do_not_end_are_refused_in_time_and_hold_little(card: Path) -> None:
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(module)
    limits = ("serve.max_bytes=1000000", "serve.held_bytes=2500000", "serve.body_seconds=3")
    server = Server(card, "serve.workers=1", *limits)
    head, part = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n", b"\0" * 900_000
    clients = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(4)]
    try:
        for client in clients:
            client.sendall(head + part)
        answers = []
        for client in clients:
            answer = client.recv(4096)
            answers.append(int(answer.split()[1]))
            while answers[-1] == 408 and client.recv(4096):  # until the server hangs up
                pass
        assert sorted(answers) == [408, 408, 503, 503]
        assert server.send("POST", "/predict", png(PIXELS[0, 0]))[0] == 200, "what was held is free again"
        assert b'ofa_requests_total{status="408"}' in server.send("GET", "/metrics")[1]
    finally:
        for client in clients:
            client.close()
        server.stop()


def test_a_request_that_raises_is_counted_as_500() -> None:
    pytest.importorskip("prometheus_client")
    from ofa.serve.app import Metrics

    async def broken(request: object) -> object:
        raise IndexError

    metrics = Metrics()
    with pytest.raises(IndexError):
        asyncio.run(metrics.watched(broken)(None))  # type: ignore[arg-type]
    assert b'ofa_requests_total{status="500"} 1.0' in metrics.text()


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ({}, r"net\.json does not say how its images are made \(side\); export"),
        ({"classes": ["a", "b"]}, "has 2 classes, 1 means and 1 deviations for a network of 10 classes and 1 channels"),
        ({"mean": [0.1, 0.2, 0.3]}, "10 classes, 3 means and 1 deviations"),
    ],
)
def test_a_card_that_does_not_fit_its_network_is_not_served(
    wrong: dict[str, Any], answer: str, card: Path, tmp_path: Path
) -> None:
    shutil.copy(card.with_suffix(".onnx"), tmp_path)
    content = json.loads(card.read_text())
    content["data"] = content["data"] | wrong if wrong else {}
    (tmp_path / "net.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=answer):
        Served.find(tmp_path / "net.json")


@pytest.mark.slow
def test_workers_share_the_port_and_their_figures(card: Path) -> None:
    server = Server(card, "serve.workers=2")
    assert [server.send("POST", "/predict", png(PIXELS[0, 0]))[0] for _ in range(20)] == [200] * 20
    assert b'ofa_requests_total{status="200"} 20.0' in server.send("GET", "/metrics")[1]
    status, out = server.stop()
    assert status == 0 and "Traceback" not in out


def _sent(server: Server, body: Any, **headers: str) -> int:
    """Status; a server that answers before it has read all may close the connection while the body is sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", "/predict", body, headers, encode_chunked="Transfer-Encoding" in headers)
        return connection.getresponse().status
    except (ConnectionResetError, BrokenPipeError):
        return 413
    finally:
        connection.close()
