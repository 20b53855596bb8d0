"""Where to begin the search for a learning rate, given the optimizer that was tuned for plain DDP."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from thinwire.methods import BlockSparse, Dense, DivideAndShuffle, Elastic, Method, block_sparse

# The best rates of the suite's grid (benchmarks/results/train_options.json), the byte-level transformer with AdamW on 4
# ranks: four times plain DDP's for nominated 1 % and 4 %, twice for 16 %. Nothing above was better.
_MOST = 4.0


@dataclass(frozen=True)
class Suggestion:
    """Settings to begin a search at; print it.

    lr: of the first parameter group; factor: what to multiply every group's by. beta1: of optimizers with betas, else
    None; momentum: of optimizers that have one, else None. why: in words.
    """

    lr: float
    factor: float
    beta1: float | None
    momentum: float | None
    why: str

    def __str__(self) -> str:
        said = [f"lr={self.lr:.3g}"]
        said += [f"beta1={self.beta1:g}"] if self.beta1 is not None else []
        said += [f"momentum={self.momentum:g}"] if self.momentum is not None else []
        return f"begin at {', '.join(said)}: {self.why}"


def suggest(method: Method, optimizer: torch.optim.Optimizer, world_size: int | None = None) -> Suggestion:
    """The learning rate, and beta1 or momentum, to begin a search at under ``method``.

    optimizer: with the settings that are best for plain DDP. world_size: for the default density, 1 / world_size; the
    size of the default process group if it is not given. Where a search ends depends on the task: try half and twice
    the rate as well, and compare at equal time.

    With error feedback a block arrives once in about 1 / density steps, as a sum. That delay acts as momentum, so the
    optimizer's own is set to 0. Under an Adam-like optimizer v sees sums that arrive in bursts, steps shrink by about
    sqrt(density), and the best learning rate rises by up to 1 / sqrt(density): here a power of two below that, and at
    most 4. Raises TypeError or ValueError for what is no method or no optimizer, or where world_size is not known.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"suggest got {type(optimizer).__name__} as optimizer: it must be a torch.optim.Optimizer")
    group = optimizer.param_groups[0]
    lr = float(group["lr"])
    beta1 = float(group["betas"][0]) if "betas" in group else None
    momentum = float(group["momentum"]) if "momentum" in group else None

    def begin(factor, why, zero=False):
        return Suggestion(lr * factor, factor, 0.0 if zero and beta1 is not None else beta1,
                          0.0 if zero and momentum is not None else momentum, why)  # fmt: skip

    if isinstance(method, Elastic):
        return suggest(method.method, optimizer, world_size)
    if isinstance(method, DivideAndShuffle):
        return begin(1.0, "the mean of the replicas moves by the mean of the gradients, as plain DDP does")
    sparse = block_sparse(method)
    if isinstance(method, Dense):
        return begin(1.0, "whole gradients are averaged, as plain DDP does")
    if sparse.memory != "error_feedback":
        return begin(1.0, "the estimate of the gradient is unbiased; its variance may ask for a smaller rate")
    density = final_density(sparse, world_size)
    if density >= 1:
        return begin(1.0, "nothing is left out, as in plain DDP")
    delay = f"a block arrives once in about {1 / density:.0f} steps, and that delay acts as momentum"
    if beta1 is not None:
        exact = 1 / math.sqrt(density)
        factor = min(_MOST, 2.0 ** math.floor(math.log2(exact) + 1e-9))
        why = (f"{delay}; its sums come in bursts, so v is larger and steps shrink by about sqrt(density). The best "
               f"rate rises by up to 1 / sqrt({density:g}) = {exact:.1f}: {factor:g} times to begin with")  # fmt: skip
        return begin(factor, why, zero=True)
    if sparse.momentum:
        return begin(1.0, f"the method keeps the momentum of {sparse.momentum:g}, before anything is sent", zero=True)
    if momentum:
        factor = 1 / math.sqrt(1 - momentum)
        why = (f"{delay}; without its momentum of {momentum:g} the optimizer moves {1 - momentum:.2g} times as far at "
               f"the same rate, and the best rate lies between the two: {factor:.1f} times to begin with")  # fmt: skip
        return begin(factor, why, zero=True)
    return begin(1.0, f"{delay}; what arrives adds up to what plain SGD sums", zero=True)


def final_density(method: BlockSparse, world_size: int | None = None) -> float:
    """The density after warm-up and ramp; of "auto", the smallest that it may be. Raises ValueError where it is 1 /
    world_size and that is not known."""
    if method.automatic:
        return method.min_density
    if method.density is not None:
        return float(method.density)
    if world_size is None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"suggest(BlockSparse({method.selection!r})): its density is 1 / world_size, and there is no process "
                "group to ask: pass world_size=, or give the method a density"
            )
        world_size = dist.get_world_size()
    return 1 / world_size
