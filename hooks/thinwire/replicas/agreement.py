"""What the ranks must agree on before they average replicas, whatever the front door."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from thinwire.methods import DivideAndShuffle, Method
from thinwire.methods.schedules import Hosts, Partition
from thinwire.replicas import hosts
from thinwire.replicas.moments import moment_names, moments_every
from thinwire.replicas.stepping import check_steps_in_pieces
from thinwire.state import agree
from thinwire.state.cautions import caution_groups
from thinwire.state.checks import check_followed

_log = logging.getLogger("thinwire")


def agreed_partitions(method: DivideAndShuffle, optimizer: Any, all_gather_object: Callable[[Any], list],
                      tensors: list[tuple[str, torch.Tensor]], check: Callable[[], None],
                      consistency_every: int, asked: Method | None = None) -> tuple[Partition, ...]:  # fmt: skip
    """The cycle of partitions, for the hosts that the ranks are on. A collective, before any group is made.

    tensors: (name, tensor) of all that is averaged. check: raises TypeError or ValueError for what cannot work. asked:
    what the user has asked for, where that is more than ``method``.
    Raises ValueError, on every rank alike, where a rank's check did or the ranks differ.
    """

    def introduce():
        check()
        kinds = {name: f"{t.dtype} {t.numel()}" for name, t in tensors}
        every = moments_every(method, optimizer)
        return (method if asked is None else asked).describe() | {
            "model": f"{len(kinds)} parameters and buffers, digest {agree.digest_of(kinds)}",
            "consistency_every": str(consistency_every),
            "optimizer's state": f"{moment_names(optimizer)} every {every} rounds" if every else "not averaged",
        }

    found = tuple(agree.check_together(all_gather_object, introduce, hosts.mine()))
    partitions = method.partitions(len(found), found)
    caution_groups(method, partitions, type(method if asked is None else asked).__name__)
    if isinstance(method.schedule, Hosts) or method.schedule == "hosts":
        names = method.schedule.hosts if isinstance(method.schedule, Hosts) else None
        if len(set(names or found)) == 1:
            _log.warning("thinwire: all ranks say that they are on one host, so schedule 'hosts' is a butterfly of all "
                         "ranks: give thinwire.schedules.Hosts(hosts=...) if that is wrong")  # fmt: skip
    return partitions


def check_optimizer(method: DivideAndShuffle, optimizer: Any, parameters: list[tuple[str, torch.Tensor]]) -> None:
    """Raise TypeError or ValueError for an optimizer whose steps the rounds cannot follow. parameters: (name, p)."""
    check_followed(optimizer, parameters, "DivideAndShuffle averages after every optimizer step")
    every = method.average_optimizer_state
    if every != "auto" and every and "betas" not in optimizer.defaults:
        raise ValueError(
            f"DivideAndShuffle(average_optimizer_state={every!r}) averages the moments of Adam-like optimizers, and "
            f"{type(optimizer).__name__} has none: use 'auto' or False"
        )
    if method.overlap == "bucket":
        check_steps_in_pieces(optimizer)
