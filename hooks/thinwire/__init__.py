"""Data-parallel training where the network is thin: one hook on a DDP model, or one compressor for Horovod."""

from thinwire.advice.verdict import advise
from thinwire.attach import attach
from thinwire.ddp import HookState, hook
from thinwire.methods import BlockSparse, Dense, DivideAndShuffle, Elastic, LocalSteps, Method, schedules
from thinwire.replicas.averager import DivideAndShuffleAverager
from thinwire.state.estimate import estimate
from thinwire.state.handle import Handle
from thinwire.state.suggest import Suggestion, suggest

__version__ = "0.1.0"
__all__ = [
    "BlockSparse", "Dense", "DivideAndShuffle", "DivideAndShuffleAverager", "Elastic", "Handle", "HookState",
    "LocalSteps", "Method", "Suggestion", "advise", "attach", "estimate", "hook", "schedules", "suggest",
]  # fmt: skip


def __getattr__(name):
    if name in ("hogwild", "horovod"):  # when asked for: few use the one, and the other imports Horovod
        import importlib

        return importlib.import_module(f"thinwire.{name}")
    raise AttributeError(f"module 'thinwire' has no attribute {name!r}")
