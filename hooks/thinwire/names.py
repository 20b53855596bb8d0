"""Names of parameters, the same however the module was wrapped."""

import torch


def parameter_names(module: torch.nn.Module) -> dict[torch.Tensor, str]:
    """Each trainable parameter's name, without what torch.compile puts into it; tied parameters have one."""
    return {p: name.replace("_orig_mod.", "") for name, p in module.named_parameters() if p.requires_grad}
