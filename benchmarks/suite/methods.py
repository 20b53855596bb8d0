"""The methods that the benchmark suite compares: PyTorch's and Horovod's own, and thinwire's."""
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import thinwire
import torch
import torch.distributed as dist
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic, Method
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks, powerSGD_hook

DDP, HOROVOD = "DDP", "Horovod"
ONE_BUCKET = 1000.0


@dataclass(frozen=True)
class Contestant:
    """A method of averaging gradients.

    attach(ddp, optimizer): makes a DDP model use it and returns thinwire's handle or None; for Horovod
    compression(named_parameters): what DistributedOptimizer takes. bucket_cap_mb: DDP's. method: thinwire's
    configuration.
    """

    label: str
    attach: Callable | None = None
    compression: Callable | None = None
    bucket_cap_mb: float | None = None
    method: Method | None = None

    @property
    def door(self) -> str:
        return DDP if self.attach else HOROVOD

    @property
    def what(self) -> str:
        """thinwire's configuration, written out."""
        return repr(self.method) if self.method else ""


def bf16_hook(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's bf16_compress_hook, which insists on NCCL, for any backend: sums in bfloat16, divided beforehand."""
    group = group or dist.group.WORLD
    gradient = bucket.buffer()
    narrow = gradient.to(torch.bfloat16).div_(group.size())
    future = dist.all_reduce(narrow, group=group, async_op=True).get_future()
    return future.then(lambda arrived: gradient.copy_(arrived.value()[0]))


def _hook(state, hook):
    return lambda ddp, optimizer: ddp.register_comm_hook(state, hook)


def _powersgd(rank, half):
    def attach(ddp, optimizer):
        # start_powerSGD_iter is the smallest that it allows: two dense steps.
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        hook = powerSGD_hook.powerSGD_hook
        ddp.register_comm_hook(state, default_hooks.fp16_compress_wrapper(hook) if half else hook)

    # On Gloo its hook hangs as soon as two buckets are in flight.
    label = f"PowerSGD rank {rank}" + (", fp16" if half else "")
    return Contestant(label, attach, bucket_cap_mb=ONE_BUCKET)


def _ours(label, method, **also):
    attach = lambda ddp, optimizer: thinwire.attach(ddp, method, optimizer=optimizer)
    return Contestant(label, attach, method=method, **also)


def _sparse(label, selection, density=None, **fields):
    chosen = selection in ("topk", "nominated")
    method = BlockSparse(selection, density=density, **({"block_size": 16, "warmup_steps": 2} if chosen else {}))
    return _ours(label, dataclasses.replace(method, **fields))


def _percent(density):
    return f"{100 * density:g} %"


NOMINATED = BlockSparse("nominated", density=0.04, block_size=16, warmup_steps=2)
CONTESTANTS = {
    "noop": Contestant("no exchange at all", _hook(None, debugging_hooks.noop_hook)),
    "dense": Contestant("plain DDP", lambda ddp, optimizer: None),
    "dense-one-bucket": Contestant("plain DDP, one bucket", lambda ddp, optimizer: None, bucket_cap_mb=ONE_BUCKET),
    "fp16": Contestant("fp16 hook", _hook(None, default_hooks.fp16_compress_hook)),
    "bf16": Contestant("bf16 hook", _hook(None, bf16_hook)),
    **{f"powersgd-{rank}" + ("-fp16" if half else ""): _powersgd(rank, half)
       for half in (False, True) for rank in (1, 2, 4)},
    "thinwire-dense": _ours("Dense()", Dense()),
    "thinwire-bf16": _ours("Dense(), bf16", Dense(wire_dtype=torch.bfloat16)),
    "thinwire-int4": _ours("Dense, int4", Dense(wire_dtype="int4", memory="error_feedback")),
    "independent-50": _sparse("independent 50 %", "independent", 0.5),
    "independent": _sparse("BlockSparse(), 1/n", "independent"),
    "independent-bf16": _sparse("BlockSparse(), 1/n, bf16", "independent", wire_dtype=torch.bfloat16),
    "independent-sega": _sparse("independent 1/n, control variate", "independent", memory="control_variate"),
    "permuted": _sparse("permuted 1/n", "permuted"),
    "permuted-bf16": _sparse("permuted 1/n, bf16", "permuted", wire_dtype=torch.bfloat16),
    **{f"shared-{100 * d:g}": _sparse(f"shared {_percent(d)}", "shared", d) for d in (0.25, 0.05)},
    "shared": _sparse("shared 12.5 %", "shared", 0.125),
    "shared-sega": _sparse("shared 12.5 %, control variate", "shared", 0.125, memory="control_variate"),
    **{f"topk-{100 * d:g}": _sparse(f"topk {_percent(d)}", "topk", d) for d in (0.01, 0.04)},
    "topk-1-bf16": _sparse("topk 1 %, bf16", "topk", 0.01, wire_dtype=torch.bfloat16),
    **{f"nominated-{100 * d:g}": _sparse(f"nominated {_percent(d)}", "nominated", d)
       for d in (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)},
    **{f"nominated-{100 * d:g}-{name}": _sparse(f"nominated {_percent(d)}, {name}", "nominated", d, wire_dtype=dtype)
       for d, name, dtype in ((0.01, "bf16", torch.bfloat16), (0.04, "bf16", torch.bfloat16),
                              (0.16, "bf16", torch.bfloat16), (0.04, "fp16", torch.float16),
                              (0.01, "int4", "int4"), (0.04, "int4", "int4"),
                              (0.12, "int4", "int4"), (0.16, "int4", "int4"))},
    **{f"nominated-{100 * d:g}-momentum": _sparse(f"nominated {_percent(d)}, momentum", "nominated", d,
                                                  momentum=0.9) for d in (0.01, 0.04)},
    "ds-sync": _ours("DS-Sync, groups of 2", DivideAndShuffle(group_size=2)),
    "ds-sync-delayed": _ours("DS-Sync, delayed", DivideAndShuffle(group_size=2, overlap="delayed")),
    "elastic": _ours("Elastic(BlockSparse(), 0.5)", Elastic(BlockSparse(), beta=0.5), bucket_cap_mb=0.5),
    "elastic-nominated": _ours("Elastic(nominated 4 %, 0.5)", Elastic(NOMINATED, beta=0.5), bucket_cap_mb=0.5),
    "horovod": Contestant("Horovod", compression=lambda named: _horovod("none")),
    "horovod-fp16": Contestant("Horovod, fp16", compression=lambda named: _horovod("fp16")),
    "horovod-nominated-4": Contestant(
        "Horovod, nominated 4 %", compression=lambda named: thinwire.horovod.Compressor(named, NOMINATED),
        method=NOMINATED),
}  # fmt: skip


def _horovod(name):
    import horovod.torch as hvd

    return getattr(hvd.Compression, name)
