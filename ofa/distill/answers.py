"""Teachers' logits on batches that come again, kept in a file so that the teachers run once.

T teachers, N images of a batch, K classes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Self

import numpy as np
import torch
from torch import Tensor


class Answers:
    """What T teachers say about numbered batches of N images each, float32.

        with Answers(path) as answers:
            logits = answers(3, lambda: [teacher(x) for teacher in teachers])

    path: of the file, which grows with what is put there, is kept where the block fails, and deleted where it does not
    (None: a temporary one).  known: batches that an earlier process flushed; they are asked again where the file has
    lost them.
    """

    def __init__(self, path: Path | None, known: Iterable[int] = ()) -> None:
        self._path = path
        held = path is not None and path.exists()
        self._known = set(known) if held else set()
        self._shape: tuple[int, ...] | None = None  # (T, N, K), from the first batch that this process asks about
        self._file: IO[bytes]
        self._file = tempfile.TemporaryFile() if path is None else open(path, "r+b" if held else "w+b")  # noqa: SIM115

    def __call__(self, batch: int, ask: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """Each teacher's logits on a batch, (N, K); `ask` gives them where they are not known."""
        if self._shape is not None and batch in self._known:
            size = self._seek(batch, self._shape)
            rows = np.frombuffer(bytearray(self._file.read(size)), np.float32).reshape(self._shape)
            return list(torch.from_numpy(rows))
        answers = torch.stack([logits.float() for logits in ask()]).cpu()
        if self._shape is None:
            self._shape = tuple(answers.shape)
            self._known &= set(range(self._file.seek(0, os.SEEK_END) // (4 * answers.numel())))
        self._seek(batch, self._shape)
        self._file.write(answers.numpy().tobytes())
        self._known.add(batch)
        return list(answers)

    def flush(self) -> None:
        """Put all that is known on disk: a checkpoint written afterwards may count on it."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        """The answers."""
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        """Close the file; without an error nobody needs it any more."""
        self._file.close()
        if self._path is not None and error is None:
            self._path.unlink(missing_ok=True)

    def _seek(self, batch: int, shape: tuple[int, ...]) -> int:
        """Go to where a batch lies; its bytes."""
        size = 4 * int(np.prod(shape))
        self._file.seek(batch * size)
        return size
