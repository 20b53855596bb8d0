"""The front door for DistributedDataParallel: one hook on a model that is there."""

from thinwire.ddp.elastic import ElasticState, attach_elastic
from thinwire.ddp.hook import HookState, attach_hook
from thinwire.ddp.local import DDPAnchored, attach_local
from thinwire.ddp.mount import hook
from thinwire.ddp.replicas import DDPReplicas, attach_replicas

__all__ = [
    "DDPAnchored", "DDPReplicas", "ElasticState", "HookState", "attach_elastic", "attach_hook", "attach_local",
    "attach_replicas", "hook",
]  # fmt: skip
