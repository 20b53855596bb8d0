"""Where to begin the search for a learning rate, given the optimizer that was tuned for plain DDP."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from thinwire.methods import BlockSparse, Dense, DivideAndShuffle, Elastic, LocalSteps, Method, block_sparse
from thinwire.methods.base import check_count

# A byte-level transformer with AdamW on 4 ranks had its best rates, without a schedule, at four times plain DDP's for
# nominated 1 % and 4 % and at twice for 16 %, and at nothing above. With warm-up and decay 16 % had it at plain DDP's
# own (benchmarks/results/losses.jsonl), so what is suggested is where to begin a search from above.
_MOST = 4.0

# Adam's beta1 where ranks step by themselves and an outer optimizer has a momentum. In a simulation that is not part of
# this repository (AdamW, 4 ranks, rounds of 16 steps) 0.5 was better than 0.9, at the rate that was best for plain DDP.
_INNER_BETA1 = 0.5

# Their steps are divided by the root of a running mean of squares.
_ADAPTIVE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)


@dataclass(frozen=True)
class Suggestion:
    """Settings to begin a search at; print it.

    factor: what to multiply every parameter group's learning rate by; lr: that of the first group then, before any
    warm-up. beta1: of optimizers with betas, else None; momentum: of optimizers that have one, else None; was_beta1 and
    was_momentum: the largest of the groups now, 0.0 where there is none. why: in words.
    """

    lr: float
    factor: float
    beta1: float | None
    momentum: float | None
    was_beta1: float
    was_momentum: float
    why: str

    def __str__(self) -> str:
        said = [f"lr={self.lr:.3g}"]
        said += [f"beta1={self.beta1:g}"] if self.beta1 is not None else []
        said += [f"momentum={self.momentum:g}"] if self.momentum is not None else []
        return f"begin at {', '.join(said)}: {self.why}"


def suggest(method: Method, optimizer: torch.optim.Optimizer, world_size: int | None = None) -> Suggestion:
    """The learning rate, and beta1 or momentum, to begin a search at under ``method``.

    optimizer: with the settings that are best for plain DDP. world_size: of the job; the size of the default process
    group if it is not given. Where a search ends depends on the task: try half and twice the rate as well, and compare
    at equal time.

    With error feedback a block arrives once in about 1 / density steps, as a sum. That delay acts as momentum, so the
    optimizer's own is set to 0. Under Adam and its like v sees sums that arrive in bursts, steps shrink by about
    sqrt(density), and the best learning rate rises by up to 1 / sqrt(density): here a power of two below that, and at
    most 4. Under SGD it lies between the rate and what the momentum made of it. Of other optimizers nothing is known,
    and they are left as they are.

    With local steps each rank makes plain DDP's steps by itself, so the rate stays; beside an outer momentum beta1 of
    Adam and its like is to be 0.5 at most. Raises TypeError or ValueError for what is no method or no optimizer, or
    where world_size is needed and not known.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"suggest got {type(optimizer).__name__} as optimizer: it must be a torch.optim.Optimizer")
    if world_size is not None:
        check_count("suggest", "world_size", world_size, 1)
    if isinstance(method, Elastic):
        return suggest(method.method, optimizer, world_size)
    if world_size is None and dist.is_available() and dist.is_initialized():
        world_size = dist.get_world_size()
    factor, why, most = _rule(method, optimizer, world_size)
    groups = optimizer.param_groups
    lr = float(groups[0].get("initial_lr", groups[0]["lr"]))  # a scheduler's warm-up may have begun
    beta1 = max((float(group["betas"][0]) for group in groups if "betas" in group), default=None)
    momentum = max((float(group["momentum"]) for group in groups if "momentum" in group), default=None)
    now = beta1 or 0.0, momentum or 0.0
    beta1, momentum = (None if own is None else min(own, most) for own in (beta1, momentum))
    return Suggestion(lr * factor, factor, beta1, momentum, *now, why)


def _rule(method, optimizer, world_size):
    """The factor of the learning rate, why, and what the optimizer's own momentum is to be at most."""
    if isinstance(method, DivideAndShuffle):
        return 1.0, "the mean of the replicas moves by the mean of the gradients, as plain DDP does", 1.0
    if isinstance(method, LocalSteps):
        return _of_local_steps(method, optimizer)
    sparse = block_sparse(method)
    if isinstance(method, Dense):
        return 1.0, "whole gradients are averaged, as plain DDP does", 1.0
    if sparse.memory != "error_feedback":
        return 1.0, "the estimate of the gradient is unbiased; its variance may ask for a smaller rate", 1.0
    density = final_density(sparse, world_size)
    if density >= 1 or world_size == 1:
        return 1.0, "nothing is left out, as in plain DDP", 1.0
    delay = f"a block arrives once in about {1 / density:.0f} steps, and that delay acts as momentum"
    if sparse.automatic:
        delay += " (at min_density; the rate may have to be smaller while the density is above it)"
    if isinstance(optimizer, _ADAPTIVE):
        exact = 1 / math.sqrt(density)
        factor = min(_MOST, 2.0 ** math.floor(math.log2(exact) + 1e-9))
        warm = "; while warm-up steps are dense, the rate must be plain DDP's" if sparse.warmup_steps else ""
        return factor, (f"{delay}; its sums come in bursts, so v is larger and steps shrink by about sqrt(density). "
                        f"The best rate rises by up to 1 / sqrt({density:g}) = {exact:.1f}: {factor:g} times to begin "
                        f"with{warm}"), 0.0  # fmt: skip
    if not isinstance(optimizer, torch.optim.SGD):
        return 1.0, (f"{delay}; what that makes of {type(optimizer).__name__}'s steps is not known: search around the "
                     "rate of plain DDP, without momentum too"), 1.0  # fmt: skip
    if sparse.momentum:
        return 1.0, f"the method keeps the momentum of {sparse.momentum:g}, before anything is sent", 0.0
    length = max(((1 - group["dampening"]) / (1 - group["momentum"]) for group in optimizer.param_groups
                  if group["momentum"]), default=1.0)  # fmt: skip
    if length == 1:
        return 1.0, f"{delay}; what arrives adds up to what plain SGD sums", 0.0
    factor = math.sqrt(length)
    return factor, (f"{delay}; without its momentum SGD moves {1 / length:.2g} times as far at the same rate, and the "
                    f"best rate lies between the two: {factor:.1f} times to begin with"), 0.0  # fmt: skip


def _of_local_steps(method, optimizer):
    why = "each rank makes plain DDP's steps by itself, at its rate"
    if not isinstance(optimizer, _ADAPTIVE) or not method.outer_momentum:
        return 1.0, why, 1.0
    return 1.0, (f"{why}; the outer optimizer has a momentum of {method.outer_momentum:g}, and beside that a low beta1 "
                 "trains better"), _INNER_BETA1  # fmt: skip


def final_density(method: BlockSparse, world_size: int | None = None) -> float:
    """The density after warm-up and ramp; of "auto", the smallest that it may be. Raises ValueError where it is 1 /
    world_size and that is not known."""
    if method.automatic:
        return method.min_density
    if method.density is not None:
        return float(method.density)
    if world_size is None:
        raise ValueError(
            f"suggest(BlockSparse({method.selection!r})): its density is 1 / world_size, and there is no process "
            "group to ask: pass world_size=, or give the method a density"
        )
    return 1 / world_size
