"""Which units each rank forwards together."""

from __future__ import annotations

from dataclasses import dataclass

from thinkmid.data.pack import Unit, plan
from thinkmid.model.transformer import ModelConfig
from thinkmid.plan.memory import pair_cost
from thinkmid.run.ranks import Ranks


@dataclass(frozen=True)
class Packing:
    """Packs of at most `capacity` tokens, balanced over ranks by what this model costs."""

    capacity: int
    model_cfg: ModelConfig
    ranks: Ranks

    def of_ranks(self, units: list[Unit]) -> list[list[list[Unit]]]:
        """Units by rank and pack; as many packs on every rank, some of them empty."""
        return plan(units, capacity=self.capacity, ranks=self.ranks.world, pair_cost=pair_cost(self.model_cfg))

    def mine(self, units: list[Unit]) -> list[list[Unit]]:
        """This rank's part of of_ranks(units)."""
        return self.of_ranks(units)[self.ranks.rank]
