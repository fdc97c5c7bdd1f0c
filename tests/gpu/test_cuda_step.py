"""Packs on a GPU: nothing in a forward, a loss or a backward waits for it, and no copy to it is pageable."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, random_groups, random_model

from thinkmid.data.pack import Reply, Unit, make_pack
from thinkmid.train import advantage
from thinkmid.train.config import LossConfig
from thinkmid.train.loss import policy_loss, text_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LOSS = LossConfig(denom=3.0)
LOSSES = {
    "text": None,
    "policy": LOSS,
    "next token": replace(LOSS, next_token=0.5, kl=0.1, entropy=0.1),
    "of sequences": replace(LOSS, is_level="sequence"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_pack_waits_for_nothing(name):
    groups = random_groups([[1, 0, 0, 1], [0, 1, 0, 0]])
    units = advantage.units(groups, LOSS, 4)
    if name in ("text", "next token"):
        units.append(Unit(name="text", prefix=np.array([3]), replies=[Reply.text(np.arange(11), 0.5)]))
    cfg, model = LOSSES[name], random_model(replace(TINY, head_dim=64), dtype=torch.bfloat16).cuda()

    def work():
        pack = make_pack(units, "cuda")
        if cfg is None:
            loss, _ = text_loss(model, pack)
        else:
            reference = model if cfg.kl else None
            loss, _ = policy_loss(model, pack, cfg, temperature=0.7, first_update=True, reference=reference)
        loss.backward()

    work()  # kernels are compiled, constants copied
    try:
        torch.cuda.set_sync_debug_mode("error")
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
