"""Sort the middle channels of a supernet by importance, so that the narrow nets inherit the best ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ofa.layers import ElasticBatchNorm, ElasticConv
from ofa.supernet import ElasticBottleneck, ElasticMBConv, Supernet


@torch.no_grad()
def sort_channels(supernet: Supernet) -> None:
    """Order the middle channels of every block by the L1 norm of the weights that read them, in place.

    The largest net computes the same function afterwards (Cai et al. 2020, sec. 3.3, elastic width).
    """
    for block in supernet.units:
        if isinstance(block, ElasticMBConv) and block.expand is not None:
            order = block.project.conv.weight.abs().sum((0, 2, 3)).argsort(descending=True, stable=True)
            _permute_block(block, block.expand, order)
        elif isinstance(block, ElasticBottleneck):
            for first, second in ((block.conv2, block.conv3), (block.conv1, block.conv2)):
                order = second.conv.weight.abs().sum((0, 2, 3)).argsort(descending=True, stable=True)
                _permute(first.conv.weight, order, 0)
                _permute_norm(first.bn, order)
                _permute(second.conv.weight, order, 1)


def _permute_block(block: ElasticMBConv, expand: ElasticConv, order: Tensor) -> None:
    _permute(expand.conv.weight, order, 0)
    _permute_norm(expand.bn, order)
    _permute(block.depthwise.weight, order, 0)
    _permute_norm(block.depthwise.bn, order)
    _permute(block.project.conv.weight, order, 1)
    if block.se is not None:
        assert block.se.expand.bias is not None and block.se.reduce.bias is not None
        _permute(block.se.reduce.weight, order, 1)
        _permute(block.se.expand.weight, order, 0)
        _permute(block.se.expand.bias, order, 0)
        inner = block.se.expand.weight.abs().sum((0, 2, 3)).argsort(descending=True, stable=True)
        _permute(block.se.reduce.weight, inner, 0)
        _permute(block.se.reduce.bias, inner, 0)
        _permute(block.se.expand.weight, inner, 1)


def _permute_norm(norm: nn.Module, order: Tensor) -> None:
    assert isinstance(norm, ElasticBatchNorm)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        _permute(tensor, order, 0)


def _permute(tensor: Tensor, order: Tensor, dimension: int) -> None:
    tensor.copy_(tensor.index_select(dimension, order))
