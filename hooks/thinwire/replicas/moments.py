"""What an Adam-like optimizer keeps of each parameter, and when it is averaged."""

import torch

from thinwire.methods import DivideAndShuffle


def moments_every(method: DivideAndShuffle, optimizer: torch.optim.Optimizer) -> int:
    """Every how many rounds the optimizer's state is averaged; 0 is never."""
    wanted = method.average_optimizer_state
    return int("betas" in optimizer.defaults) if wanted == "auto" else int(wanted)


def moment_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What an Adam-like optimizer calls its moments in its state."""
    if isinstance(optimizer, torch.optim.Adamax):
        return "exp_avg", "exp_inf"
    amsgrad = any(group.get("amsgrad") for group in optimizer.param_groups)
    return ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if amsgrad else ())
