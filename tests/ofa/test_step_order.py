"""Steps whose order cannot work: they say which goes first."""

from __future__ import annotations

import pytest

from ofa.compress.binary import Binary
from ofa.compress.chain import Step, Work, compress
from ofa.compress.channels import Channels
from ofa.compress.equalize import Equalization
from ofa.compress.gating import Gating
from ofa.compress.linear import Linear
from ofa.compress.low_rank import LowRank
from ofa.data import digits
from ofa.errors import UserError
from ofa.finetune import Finetuning
from tests.ofa.nets import random_net

BARE = Finetuning(epochs=0)
INT8, GATING, XNOR = Linear(images=64), Gating(finetuning=BARE), Binary("xnor", finetuning=BARE)
CHANNELS, LOW_RANK = Channels(images=64, finetuning=BARE), LowRank(finetuning=BARE)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((INT8, CHANNELS), "put channels before"),
        ((Equalization(), CHANNELS), "put channels before"),
        ((XNOR, CHANNELS), "put channels before"),
        ((GATING, CHANNELS), "put channels before"),
        ((LOW_RANK, INT8, CHANNELS), "put channels before"),
        ((LOW_RANK, Equalization(), CHANNELS), "put channels before"),
        ((GATING, GATING), "give gating once"),
        ((INT8, XNOR), "put xnor before"),
        ((XNOR, XNOR), "put xnor before"),
    ],
)
def test_an_order_that_cannot_work_names_the_step_that_goes_first(steps: tuple[Step, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(compress(random_net(), {str(i): step for i, step in enumerate(steps)}, Work(digits(), 16)))
