"""The process that runs once-for-all's own code: `once_for_all.OnceForAll` starts it and talks to it.

Its package is called `ofa` too, so this file imports nothing of this project.  Messages are pickles: in comes
`(command, arguments)`, out goes `(value, wall seconds, CPU seconds, error or None)`.  A command is a method of Worker;
arrays travel as numpy.
"""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import random
import sys
import time
import traceback
import types
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Images = NDArray[np.float32]
MBV = {"dropout_rate": 0, "ks_list": [3, 5, 7], "expand_ratio_list": [3, 4, 6], "depth_list": [2, 3, 4]}
RESNET = {
    "dropout_rate": 0,
    "depth_list": [0, 1, 2],
    "expand_ratio_list": [0.2, 0.25, 0.35],
    "width_mult_list": [0.65, 0.8, 1.0],
}
# as once-for-all's model_zoo.ofa_net builds them: class, options, class of the closed form of its FLOPs
NETS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ofa_mbv3_w1.0": ("OFAMobileNetV3", MBV | {"width_mult": 1.0}, "Mbv3FLOPsModel"),
    "ofa_mbv3_w1.2": ("OFAMobileNetV3", MBV | {"width_mult": 1.2}, "Mbv3FLOPsModel"),
    "ofa_proxyless_w1.3": ("OFAProxylessNASNets", MBV | {"width_mult": 1.3}, "ProxylessNASFLOPsModel"),
    "ofa_resnet50": ("OFAResNets", RESNET, "ResNet50FLOPsModel"),
}


def pictures(n: int, side: int, *, seed: int) -> Images:
    """Images (n, 3, side, side) of random coarse patches and noise, so that no two have the same averages."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((n, 3, 4, 4)).repeat(side // 4, axis=2).repeat(side // 4, axis=3)
    return (coarse + 0.5 * rng.standard_normal(coarse.shape)).astype(np.float32)


class Worker:
    """One supernet of once-for-all and what can be asked of it.

    Architectures are its own dictionaries: {"ks": [...], "e": [...], "d": [...]}, for ResNet50 {"d", "e", "w"}.
    """

    def build(self, net: str, *, seed: int = 0, classes: int = 1000, random_values: bool = True) -> int:
        """Make the supernet of a name in NETS; `random_values`: no parameter or statistic is left at its default.

        Returns: its number of parameters.
        """
        torch.manual_seed(seed)
        kind, options, _ = NETS[net]
        networks = importlib.import_module("ofa.imagenet_classification.elastic_nn.networks")
        self.name, self.net = net, getattr(networks, kind)(n_classes=classes, **copy.deepcopy(options))
        if random_values:
            self._randomise()
        return sum(p.numel() for p in self.net.parameters())

    @torch.no_grad()
    def _randomise(self) -> None:
        """Affine, biases and transforms at random; statistics of random subnets, so that logits follow the image."""
        importlib.import_module("ofa.utils").init_models(self.net)  # He, by fan-out
        for name, parameter in self.net.named_parameters():
            if name.endswith("_matrix"):
                parameter += 0.05 * torch.randn_like(parameter)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5) if name.endswith("weight") else parameter.uniform_(-0.3, 0.3)
        images = torch.from_numpy(pictures(32, 96, seed=1))
        norms = [m for m in self.net.modules() if isinstance(m, nn.BatchNorm2d)]
        self.net.set_max_net()
        self.net.train()
        for i in range(8):
            for norm in norms:
                norm.momentum = 1 / (i + 1)
            self.net(images)
            self.sample(i)
        for norm in norms:
            norm.momentum = 0.1
        self.net.eval()
        last = [m for m in self.net.modules() if isinstance(m, nn.Linear)][-1]
        last.bias.sub_(self.net(images).mean(0))  # what all images share would hide a difference

    def save(self, path: str, *, old_names: bool = False) -> list[str]:
        """Write {"state_dict"} as its checkpoints are; `old_names`: with the keys of its first release.

        Returns: the keys.
        """
        state = self.net.state_dict()
        if old_names:
            state = {_old_name(name): tensor for name, tensor in state.items()}
            copy.deepcopy(self.net).load_state_dict(state)  # its own reader knows them
        torch.save({"state_dict": state}, path)
        return list(state)

    def sample(self, seed: int) -> dict[str, list[float]]:
        """An architecture from its own sampler."""
        random.seed(seed)
        return self.net.sample_active_subnet()

    def set(self, arch: Mapping[str, Any]) -> None:
        """Choose the architecture that the commands below run."""
        self.net.set_active_subnet(**arch)

    def logits(self, images: Images, arch: Mapping[str, Any], *, train: bool = False) -> NDArray[np.float32]:
        """Logits (N, classes) of the supernet for images (N, 3, H, W)."""
        self.set(arch)
        self.net.train(train)
        with torch.no_grad():
            return self.net(torch.from_numpy(images)).numpy()

    # -- timed work: `given` first, then the command again and again --------------------------------------------------

    def given(self, images: Images, labels: NDArray[np.int64], *, lr: float = 0.01, decay: float = 3e-5) -> None:
        """Images (N, 3, H, W) and labels (N,) for the work below, and a fresh optimizer as its run manager makes it."""
        utils = importlib.import_module("ofa.utils")
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        keys = ["bn", "bias"]  # no_decay_keys of its train_ofa_net.py
        groups = [list(self.net.get_parameters(keys, mode=mode)) for mode in ("exclude", "include")]
        self.optimizer = utils.build_optimizer(groups, "sgd", None, lr, decay, keys)
        self.loss = utils.cross_entropy_with_label_smoothing

    def step(self, arch: Mapping[str, Any] | None = None) -> float:
        """One training step, as its RunManager.train_one_epoch; without `arch`, of the extracted net."""
        net = self._net(arch).train()
        loss = self.loss(net(self.images), self.labels)
        net.zero_grad()
        loss.backward()
        self.optimizer.step() if arch else self.sub_optimizer.step()
        return loss.item()

    def forward(self, arch: Mapping[str, Any] | None = None, *, train: bool = False, passes: int = 1) -> float:
        """Passes without gradients; without `arch`, of the extracted net."""
        net = self._net(arch).train(train)
        with torch.no_grad():
            return [float(net(self.images)[0, 0]) for _ in range(passes)][-1]

    def extract(self, arch: Mapping[str, Any]) -> int:
        """Extract a subnet, which `arch=None` means from now on.  Returns: its parameters."""
        self.set(arch)
        self.subnet = self.net.get_active_subnet(preserve_weight=True)
        return sum(p.numel() for p in self.subnet.parameters())

    def tune(self) -> None:
        """Give the extracted net an optimizer."""
        utils = importlib.import_module("ofa.utils")
        keys = ["bn", "bias"]
        groups = [list(self.subnet.get_parameters(keys, mode=mode)) for mode in ("exclude", "include")]
        self.sub_optimizer = utils.build_optimizer(groups, "sgd", None, 0.01, 3e-5, keys)

    def recalibrate(self, batches: int = 1) -> None:
        """Set the extracted net's batch-norm statistics from the images, `batches` times the same batch."""
        module = importlib.import_module("ofa.imagenet_classification.elastic_nn.utils")
        module.set_running_statistics(self.subnet, [(self.images, self.labels)] * batches)

    def copy_state(self) -> None:
        """A plain copy of the subnet's state, the least that extraction can cost."""
        self.copied = {name: tensor.clone() for name, tensor in self.subnet.state_dict().items()}

    def flops(self, arch: Mapping[str, Any], resolution: int, n: int = 1) -> float:
        """Millions of multiply-accumulates by its closed form, computed n times."""
        predictor = importlib.import_module("ofa.nas.efficiency_predictor")
        model = getattr(predictor, NETS[self.name][2])(self.net)
        return [model.get_efficiency(dict(arch) | {"image_size": resolution}) for _ in range(n)][-1]

    def fvcore(self, resolution: int) -> dict[str, float]:
        """Operations of the extracted net by operator, as fvcore counts them."""
        from fvcore.nn import FlopCountAnalysis

        count = FlopCountAnalysis(self.subnet.eval(), torch.zeros(1, 3, resolution, resolution))
        return dict(count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator())

    def about(self) -> dict[str, Any]:
        """Where its code lies, and with which torch and how many threads it runs."""
        found = importlib.import_module("ofa.imagenet_classification")
        return {"file": found.__file__, "torch": torch.__version__, "threads": torch.get_num_threads()}

    def _net(self, arch: Mapping[str, Any] | None) -> nn.Module:
        if arch is None:
            return self.subnet
        self.set(arch)
        return self.net


def _old_name(name: str) -> str:
    head, _, tail = name.partition(".conv.")
    return f"{head}.mobile_inverted_conv.{tail}" if head.startswith("blocks.") and head.count(".") == 1 else name


def _stubs() -> None:
    """Modules that once-for-all imports and that this work does not use or newer versions of torch lack."""
    six = types.ModuleType("torch._six")
    six.__dict__.update(string_classes=(str, bytes), int_classes=(int,), container_abcs=None)
    sys.modules["torch._six"] = six
    for name in ("horovod", "horovod.torch", "gdown"):
        sys.modules.setdefault(name, types.ModuleType(name))


def main() -> None:
    """Answer commands until the pipe closes."""
    threads = int(sys.argv[1])
    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what once-for-all prints goes where errors go
    warnings.simplefilter("ignore")
    _stubs()
    worker = Worker()
    while True:
        try:
            command, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        value, error = None, None
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            value = getattr(worker, command)(**arguments)
        except Exception:
            error = traceback.format_exc()
        pickle.dump((value, time.perf_counter() - wall, time.process_time() - cpu, error), answers)
        answers.flush()


if __name__ == "__main__":
    main()
