"""Which version of an operator runs: the compiled one where it was built, :mod:`thinwire.ops.reference` where not."""

import functools
import importlib
import json
import logging
import os
from pathlib import Path

import torch

from thinwire.ops import reference

__all__ = ["call", "native", "why_not_native"]

_log = logging.getLogger("thinwire")
_why_not = None
_warned = False


def _check_built_for_this_torch():
    """Raise ImportError where the operators were built for another torch: its C++ interface may have changed."""
    record = Path(__file__).parents[1] / "_build.json"
    built_for = json.loads(record.read_text())["torch"] if record.exists() else torch.__version__
    if built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(f"built for torch {built_for}, and this is {torch.__version__}: install thinwire anew")


if os.environ.get("THINWIRE_REFERENCE") == "1":
    _why_not = "THINWIRE_REFERENCE=1 asks for the plain-PyTorch operators"
else:
    try:
        _check_built_for_this_torch()
        importlib.import_module("thinwire._C")  # its import registers the operators
        for _name in (
            "accumulate_", "add_quantised", "add_rows_", "deal_elements", "draw_blocks", "examine", "gather_blocks",
            "place_slots", "quantise_blocks_", "scatter_blocks_", "select_blocks", "settle_", "take_blocks_",
            "undeal_elements", "unite_blocks", "unquantise_blocks",
        ):  # fmt: skip
            torch.library.register_fake(f"thinwire::{_name}", lambda *args: None)
    except (ImportError, OSError, RuntimeError) as error:
        _why_not = f"{type(error).__name__}: {error}"


def native(device_type: str) -> bool:
    """Whether compiled operators serve tensors on this type of device ("cpu", "cuda"; no others are compiled)."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None or _why_not is not None:
        return False
    return _has_kernel(key)


@functools.cache  # every operator asks, and the question takes as long as a small operator
def _has_kernel(key):
    return torch._C._dispatch_has_kernel_for_dispatch_key("thinwire::accumulate_", key)


def why_not_native() -> str | None:
    """Why there are no compiled operators, or None where there are."""
    return _why_not


def call(name: str, device: torch.device, *args: object) -> None:
    """Run an operator on tensors of this device: the compiled one, or the reference and say so once."""
    global _warned
    if native(device.type):
        getattr(torch.ops.thinwire, name)(*args)
        return
    if not _warned:
        _warned = True
        reason = _why_not or f"thinwire was built without them for {device.type}"
        _log.warning("thinwire: no compiled operators for %s (%s): plain PyTorch is used and is slower. "
                     "'python -m thinwire info' says more.", device.type, reason)  # fmt: skip
    getattr(reference, name)(*args)
