"""Data-parallel training where the network is thin: one hook on a DDP model, or one compressor for Horovod."""

from thinwire.advice import advise
from thinwire.averager import DivideAndShuffleAverager
from thinwire.ddp import HookState, attach, hook
from thinwire.estimate import estimate
from thinwire.methods import BlockSparse, Dense, DivideAndShuffle, Elastic, Method

__version__ = "0.1.0"
__all__ = [
    "BlockSparse", "Dense", "DivideAndShuffle", "DivideAndShuffleAverager", "Elastic", "HookState", "Method", "advise",
    "attach", "estimate", "hook",
]  # fmt: skip


def __getattr__(name):
    if name in ("hogwild", "horovod"):  # imported when asked for: thinwire.horovod imports Horovod
        import importlib

        return importlib.import_module(f"thinwire.{name}")
    raise AttributeError(f"module 'thinwire' has no attribute {name!r}")
