"""AOTInductor: the network compiled ahead of time into a .pt2 package, loaded from Python or C++ without TorchScript.

Beside it, in `cpp`, lies a C++ program that runs it with libtorch and without Python.  A package holds machine code for
the processor that it was made on.  N images, K classes.
"""

from __future__ import annotations

import shutil
import warnings
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ofa.errors import UserError, said
from ofa.export.latency import require_threads
from ofa.export.runtime import Call, Logits, inference, laid_out, require_file, shape_of
from ofa.extras import quiet

SOURCES = ("main.cpp", "CMakeLists.txt", "Makefile")


@dataclass(frozen=True, slots=True)
class Aoti:
    """No options: float32, any number of images at once."""

    @property
    def suffix(self) -> str:
        """How its files end."""
        return ".float.pt2"

    def export(self, net: nn.Module, path: Path, images: Tensor) -> None:
        """Compile with the C++ compiler that Inductor finds; raises UserError where that cannot be done."""
        from torch._inductor import aoti_compile_and_package, config

        shape_of(images)
        example = laid_out(images[:1].repeat(2, 1, 1, 1))  # one image would be taken for a constant
        path.parent.mkdir(parents=True, exist_ok=True)
        with quiet(), config.patch({"cpp.dynamic_threads": True}):  # else the threads of now are compiled in
            try:
                batch = {0: torch.export.Dim("batch", min=1)}
                program = torch.export.export(inference(net), (example,), dynamic_shapes=(batch,))
                aoti_compile_and_package(program, package_path=str(path))
            except Exception as error:  # those of torch.export, Inductor and the compiler share no narrower class
                raise UserError(f"AOTInductor cannot compile this net ({said(error)}); mend what it names") from None
        write_cpp(path.parent / "cpp")

    def load(self, path: Path, threads: int = 1) -> Call:
        """A function from images (N, C, H, W) to logits (N, K); `threads` are those of the whole process."""
        from torch._inductor import aoti_load_package

        require_threads(threads)
        try:
            if not zipfile.is_zipfile(require_file(path)):
                raise ValueError("it does not end as a package")
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = aoti_load_package(str(path))
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is no usable AOTInductor package ({said(error)}); export it again") from None
        torch.set_num_threads(threads)

        def call(images: NDArray[np.float32]) -> Logits:
            with torch.inference_mode():
                return model(laid_out(torch.from_numpy(images))).numpy()  # compiled for these strides

        return call

    def describe(self, path: Path) -> dict[str, Any]:
        """Nothing beyond the file."""
        return {}


def write_cpp(folder: Path) -> list[Path]:
    """Write the C++ program that runs a package, its CMakeLists.txt and its Makefile."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        shutil.copy(str(files("ofa.export") / "cpp" / name), folder / name)
    return [folder / name for name in SOURCES]
