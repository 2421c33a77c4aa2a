"""A run of training by several processes: what each computes, and what only the leader writes.

All processes read the run's folder, so it lies on one machine or on a disk that they share.
"""

from dataclasses import replace
from typing import Literal

from dbrx_fn.errors import InputError
from dbrx_fn.model.shard import WHOLE, Shard, own_shard
from dbrx_fn.runs.plan import Plan
from dbrx_fn.runtime.group import group
from dbrx_fn.training.step import check_memory, check_replicas

Parallel = Literal["data", "tensor"]
"""What several processes divide: the micro-batches of each step, or the model."""


def own_plan(plan: Plan, parallel: Parallel) -> tuple[Plan, Shard]:
    """The plan with this process's part of the model, and its place among those that share the micro-batches.

    Raises:
        InputError: if so many processes can't share the run, or the machine has too little memory.
        ConfigError: if they can't share the model.
    """
    replica = own_shard() if parallel == "data" else WHOLE
    check_replicas(plan.recipe, replica.size)
    if parallel == "tensor" and group().size > 1:
        if plan.trains_part:
            raise InputError("--parallel tensor is for training a whole model: take --parallel data for a part of one.")
        plan = replace(plan, config=replace(plan.config, shard=own_shard()))
    if not plan.trains_part:
        check_memory(plan.config)
    return plan, replica


def whole_plan(plan: Plan) -> Plan:
    """The plan of the whole model."""
    return replace(plan, config=replace(plan.config, shard=WHOLE))
