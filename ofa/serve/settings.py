"""What a server may be told, and the network it serves."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ofa.errors import UserError
from ofa.export.card import Metric, card_of, file_of, load_card
from ofa.files import read_json
from ofa.processor import saturates

VARIABLE = "OFA_SERVE"  # carries the settings to the worker processes


@dataclass(frozen=True, slots=True)
class Settings:
    """What a server may be told.

    host, port: where it listens.  workers: processes (None: one for each core).  batch: images at most that run at
    once; more are taken together only while the network is busy, so that a lone request never waits.  waiting: images
    at most that wait, beyond which requests are refused (503).  max_bytes: of a request's body; held_bytes: of all the
    bodies that a worker holds, beyond which it refuses more (503); body_seconds: that a client gets to send one (408).
    max_pixels: of an image, read from its header before it is decoded.  threads: of ONNX Runtime in each worker.
    stop_seconds: that open requests get to finish after the signal to stop.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int | None = None
    batch: int = 16
    waiting: int = 256
    max_bytes: int = 10_000_000
    held_bytes: int = 100_000_000
    body_seconds: int = 30
    max_pixels: int = 25_000_000
    threads: int = 1
    stop_seconds: int = 10

    def __post_init__(self) -> None:
        if self.workers is None:
            object.__setattr__(self, "workers", len(os.sched_getaffinity(0)))
        limits = ("batch", "waiting", "max_bytes", "held_bytes", "body_seconds", "max_pixels", "stop_seconds")
        for name in ("workers", "threads", *limits):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"serve.{name}={value} must be a whole number, at least 1")

        if not isinstance(self.port, int) or not 0 < self.port < 2**16:
            raise UserError(f"serve.port={self.port} must be a whole number from 1 to 65535")

    def to_environment(self) -> None:
        """Leave the settings where worker processes find them."""
        os.environ[VARIABLE] = json.dumps(asdict(self))

    @staticmethod
    def from_environment() -> Settings:
        """What `to_environment` left."""
        if VARIABLE not in os.environ:
            raise UserError(f"{VARIABLE} is not set; start the server with ofa-serve model=<card or ONNX file>")
        return Settings(**json.loads(os.environ[VARIABLE]))


@dataclass(frozen=True, slots=True)
class Served:
    """An ONNX file and what its card says about images: side in pixels, mean and std of each channel, classes.

    weight_bits: of int8 weights, 0 where the card does not say or they are floats.
    """

    file: Path
    stored_side: int
    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    digest: str
    weight_bits: int = 0

    @staticmethod
    def find(model: str | Path) -> Served:
        """The network of a card (.json), or of an ONNX file with its card beside it.

        Raises UserError where there is no card, or where it does not speak for one ONNX file, as it is, and its data.
        """
        card_file = card_of(model)
        if not isinstance(read_json(card_file), dict):
            raise UserError(f"{card_file} is no card; name one that ofa-export wrote")
        card = load_card(card_file)
        file, data = file_of(card, card_file, ".onnx"), dict(card.data)
        if missing := [name for name in ("side", "mean", "std", "classes") if name not in data]:
            raise UserError(
                f"{card_file} does not say how its images are made ({missing[0]}); export the network again"
            )
        side, mean, std = int(data["side"]), tuple(data["mean"]), tuple(data["std"])
        counts = len(data["classes"]), len(mean), len(std)
        if counts != (card.spec.classes, card.spec.in_channels, card.spec.in_channels):
            told = f"{counts[0]} classes, {counts[1]} means and {counts[2]} deviations"
            wanted = f"{card.spec.classes} classes and {card.spec.in_channels} channels"
            raise UserError(f"{card_file} has {told} for a network of {wanted}; export the network again")
        sides, bits = (side, card.spec.resolution), card.metrics.get("weight_bits", Metric(0, ""))
        digest = card.files[file.name]
        return Served(file, *sides, mean, std, tuple(data["classes"]), digest, int(bits.value))

    @property
    def caution(self) -> str:
        """What this processor does to the network, or nothing."""
        if self.weight_bits < 8 or not saturates():
            return ""
        return (
            f"{self.file} has weights of 8 bits, with which sums overflow on this processor (x86 without VNNI): "
            "answers may be wrong; export the network here, or with compress.quantization.reduce_range=true"
        )
