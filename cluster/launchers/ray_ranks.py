"""The other ranks of a replica as Ray actors in the replica's placement group.

Serve makes the group, one bundle a rank, and puts the replica into the first; so the scheduler
places a replica whole, on one machine if it can (PACK). An actor ends with the replica that owns
it.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from model.open import follow_rank
from model.ranks.followers import Order
from penstock.errors import PenstockError


class Rank:
    """The actor: its process is the rank."""

    def run(self, order_json: str) -> str:
        """Follows until rank 0 hangs up; how it ended if that was earlier, else ''."""
        try:
            follow_rank(Order.model_validate_json(order_json))
        except PenstockError as error:
            return error.message
        except (OSError, EOFError, RuntimeError) as error:
            return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return ""


class ActorRank:
    """`RankProcess` over one such actor; its constructor is a `RankStarter`."""

    def __init__(self, order: Order) -> None:
        group = get_current_placement_group()
        if group is None:
            raise PenstockError("this replica has no placement group for its ranks")
        bundle = group.bundle_specs[order.rank]
        actor_of: Any = ray.remote(Rank)
        self._actor = actor_of.options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=order.rank
            ),
        ).remote()
        self._end: Any = self._actor.run.remote(order.model_dump_json())
        self._how: str | None = None

    def ended(self) -> str | None:
        if self._how is None and ray.wait([self._end], timeout=0)[0]:
            try:
                self._how = str(ray.get(self._end)) or "status 0"
            except ray.exceptions.RayError as error:
                self._how = f"status of its actor: {type(error).__name__}"
        return self._how

    def stop(self) -> None:
        ray.kill(self._actor)
