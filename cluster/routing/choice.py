"""A routing policy by its name in the settings."""

from __future__ import annotations

from cluster.policy import Policy, RoutingPolicy
from cluster.routing.cost import CostPolicy
from cluster.routing.simple import BlockOverlap, LeastLoad, RoundRobin


def open_policy(name: RoutingPolicy) -> Policy:
    match name:
        case RoutingPolicy.COST:
            return CostPolicy()
        case RoutingPolicy.ROUND_ROBIN:
            return RoundRobin()
        case RoutingPolicy.LEAST_LOAD:
            return LeastLoad()
        case RoutingPolicy.BLOCK_OVERLAP:
            return BlockOverlap()
