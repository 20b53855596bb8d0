"""Names of parameters, the same however the module was wrapped."""

from collections.abc import Container

import torch


def parameter_names(module: torch.nn.Module, ignored: Container[str] = (),
                    frozen: bool = False) -> dict[torch.Tensor, str]:  # fmt: skip
    """Each trainable parameter's name, without what torch.compile puts into it; tied parameters have one.

    ignored: names to leave out, as in DDP's ``parameters_to_ignore``. frozen: also of what is not trainable now.
    """
    named = {p: name for name, p in module.named_parameters() if (p.requires_grad or frozen) and name not in ignored}
    return {p: name.replace("_orig_mod.", "") for p, name in named.items()}


def float_buffers(module: torch.nn.Module, ignored: Container[str] = ()) -> list[tuple[str, torch.Tensor]]:
    """Its floating-point buffers by name, each once; without those of the ignored names."""
    named = module.named_buffers()
    return [(name, buffer) for name, buffer in named if buffer.is_floating_point() and name not in ignored]
