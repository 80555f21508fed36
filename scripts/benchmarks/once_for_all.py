"""once-for-all's own code in a process of its own, to compare with: `with OnceForAll(folder) as rival: ...`.

    pip install --no-deps --target build/once-for-all ofa==0.1.0.post202307202001
    python scripts/benchmarks/once_for_all.py [--ofa build/once-for-all]

Its package has this project's name, so it lives in a folder and a process of its own.  A call is a command of
`once_for_all_worker.Worker` with its arguments; the answer holds the value, wall and CPU seconds.  The other process
waits meanwhile, so that two sides can be timed in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parents[2]))

from ofa.errors import UserError
from ofa.space import Genes, Space
from scripts.benchmarks.once_for_all_worker import pictures

RELEASE = "ofa==0.1.0.post202307202001"
FOLDER = Path("build/once-for-all")
WORKER = Path(__file__).parent / "once_for_all_worker.py"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command returned, and how long it took there, in seconds."""

    value: Any
    wall_s: float
    cpu_s: float


class OnceForAll:
    """The other process; raises UserError where `folder` does not hold once-for-all."""

    def __init__(self, folder: Path = FOLDER, *, threads: int = 1):
        if not (folder / "ofa/imagenet_classification").is_dir():
            raise UserError(
                f"{folder} does not hold once-for-all; run `pip install --no-deps --target {folder} {RELEASE}`"
            )
        line = [sys.executable, "-P", str(WORKER), str(threads)]
        environment = os.environ | {"PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=folder
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def __call__(self, command: str, **arguments: Any) -> Answer:
        """Run a command of `Worker`; raises RuntimeError with the other side's traceback."""
        assert self.process.stdin is not None and self.process.stdout is not None
        pickle.dump((command, arguments), self.process.stdin)
        self.process.stdin.flush()
        try:
            value, wall, cpu, error = pickle.load(self.process.stdout)
        except EOFError:
            raise RuntimeError(f"once-for-all's process ended during {command!r}") from None
        if error:
            raise RuntimeError(f"once-for-all failed in {command!r}:\n{error}")
        return Answer(value, wall, cpu)


def arch_dict(space: Space, genes: Genes) -> dict[str, list[float]]:
    """The architecture of genes (1, G) as once-for-all writes it, for its spaces with kernels and one width."""
    names = {"ks": "kernel", "e": "expand", "d": "depth"}
    return {name: [int(v) for v in space.values(genes, dimension)[0]] for name, dimension in names.items()}


def add_option(parser: argparse.ArgumentParser) -> None:
    """The option `--ofa`."""
    line = f"folder of `pip install --no-deps --target FOLDER {RELEASE}`"
    parser.add_argument("--ofa", type=Path, default=FOLDER, help=line)


def main() -> None:
    """Build each supernet, run random architectures, and print their FLOPs and how far logits follow the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser)
    images = pictures(8, 128, seed=0)
    with OnceForAll(parser.parse_args().ofa) as rival:
        print(json.dumps(rival("about").value))
        for net in ("ofa_mbv3_w1.0", "ofa_mbv3_w1.2", "ofa_proxyless_w1.3", "ofa_resnet50"):
            parameters = rival("build", net=net).value
            arch = rival("sample", seed=0).value
            logits = rival("logits", images=images, arch=arch).value
            follow = logits.std(0).mean() / logits.std()
            flops = rival("flops", arch=arch, resolution=128).value
            print(
                f"{net}: {parameters} parameters, {flops:.1f} MMACs; {follow:.0%} of the logits' spread between images"
            )


if __name__ == "__main__":
    main()
