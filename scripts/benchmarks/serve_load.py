"""ofa-serve under load on loopback: requests/s, median and 99th percentile at 1, 8 and 64 connections, by wrk.

    python scripts/benchmarks/serve_load.py --card runs/digits/export/stm32f746/int8.json --workers 1 2

wrk runs on the same cores as the server, so the figures are a lower bound of what the server does alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.errors import UserError
from ofa.export.card import load_card
from ofa.export.latency import device_card
from ofa.files import write_json
from scripts.benchmarks.about import about

LUA = """
wrk.method = "POST"
local file = io.open("{image}", "rb")
wrk.body = file:read("*all")
wrk.headers["Content-Type"] = "image/png"
function done(summary, latency, requests)
  local errors = summary.errors.status + summary.errors.read + summary.errors.timeout
  io.write(string.format("RESULT %d %d %f %f %d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), errors))
end
"""


def main() -> None:
    """Start a server for each number of workers and print one line for each number of connections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=Path, required=True, help="card of an exported network")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    if shutil.which("wrk") is None:
        raise UserError("wrk is not installed; install it with: apt-get install wrk")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        script = _script(Path(folder), load_card(args.card).data)
        for workers in args.workers:
            server = _start(args.card, args.port, workers)
            try:
                for connections in args.connections:
                    row = {"workers": workers, **_load(script, args.port, connections, args.seconds)}
                    rows.append(row)
                    print(
                        f"{workers} workers, {connections:2} connections: {row['requests_per_s']:8.1f} requests/s, "
                        f"p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms, n {row['n']}, {row['errors']} errors",
                        flush=True,
                    )
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait(60)
    found = {"rows": rows, "load_average": os.getloadavg(), "device": device_card(), "about": about()}
    print(json.dumps({key: found[key] for key in ("load_average", "device", "about")}))
    if args.out:
        write_json(args.out, found)


def _script(folder: Path, data: object) -> Path:
    """wrk's script, and the image that it posts: random pixels of the stored size, as PNG."""
    assert isinstance(data, dict)
    side, channels = data["side"], len(data["mean"])
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, channels), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "PNG")
    (folder / "image.png").write_bytes(file.getvalue())
    (folder / "post.lua").write_text(LUA.replace("{image}", str(folder / "image.png")))
    return folder / "post.lua"


def _start(card: Path, port: int, workers: int) -> subprocess.Popen[bytes]:
    script = Path(__file__).parents[1] / "serve.py"
    options = [f"model={card}", f"serve.port={port}", f"serve.workers={workers}"]
    server = subprocess.Popen([sys.executable, str(script), *options])
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
            return server
        except OSError:
            time.sleep(0.5)
    server.kill()
    raise UserError("the server did not start")


def _load(script: Path, port: int, connections: int, seconds: int) -> dict[str, float]:
    address = f"http://127.0.0.1:{port}/predict"
    line = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(script), address]
    out = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    found = re.search(r"RESULT (\d+) (\d+) ([\d.]+) ([\d.]+) (\d+)", out)
    assert found, out
    n, micros, p50, p99, errors = map(float, found.groups())
    figures = {"requests_per_s": 1e6 * n / micros, "p50_ms": p50 / 1e3, "p99_ms": p99 / 1e3}
    return {"connections": connections, "n": int(n), "errors": int(errors), **figures}


if __name__ == "__main__":
    main()
