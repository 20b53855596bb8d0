"""One rank of run.py: a short training, and the end of its script in one of several ways."""
import datetime
import os
import signal
import sys
import time

import thinwire
import torch
import torch.distributed as dist
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

SMALL = {"density": 0.1, "block_size": 16, "dense_below": 20}
METHODS = {
    "plain DDP": None,
    "fp16 hook": fp16_compress_hook,
    "independent": BlockSparse(block_size=16),
    "nominated": BlockSparse("nominated", **SMALL),
    "Elastic": Elastic(Dense(), beta=0.3),
    "DivideAndShuffle": DivideAndShuffle(),
}
WAYS = {
    "finalize, barrier, destroy": "as the documentation advises",
    "finalize, destroy": "no barrier",
    "barrier, destroy": "no finalize",
    "nothing": "the script just ends",
    "exception": "on rank 1, between two steps",
    "exception in backward": "on rank 0, with buckets under way that rank 1 sends a little later",
    "Ctrl-C": "SIGINT to all ranks, in the middle of training",
    "SIGTERM": "to all ranks, as from torchrun, where the script answers it with sys.exit",
}
LINGER: list = []  # emptied when the interpreter ends
INTERRUPTED = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}
STEPS = 6


class Slow:
    """Something that takes a while to be freed, as large programs do."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __del__(self, sleep=time.sleep):
        sleep(self._seconds)


def main(method: str, way: str, rank: int, ranks: int, store: dist.Store, started,
         linger: float = 0.0) -> None:  # fmt: skip
    """The script. started: called when training has begun, for whoever interrupts it. linger: seconds that the
    interpreter's end takes longer."""
    if linger:
        LINGER.append(Slow(linger))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes away from what runs in background
    if way == "SIGTERM":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=30))
    torch.manual_seed(rank)
    model = torch.nn.Sequential(*[torch.nn.Linear(40, 40) for _ in range(8)])
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.005)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle, what = None, METHODS[method]
    if callable(what):
        ddp.register_comm_hook(None, what)
    elif what is not None:
        handle = thinwire.attach(ddp, what, optimizer=optimizer)
    last = time.monotonic() + 10 if way in INTERRUPTED else 0
    step = 0
    while step < STEPS or time.monotonic() < last:
        optimizer.zero_grad()
        loss = ddp(torch.randn(4, 40)).square().mean()
        if way == "exception in backward" and step == STEPS // 2:
            if rank == 0:
                model[3].weight.register_hook(fail)
            else:
                time.sleep(0.2)
        loss.backward()
        optimizer.step()
        step += 1
        if step == 2:
            started()
        if way == "exception" and rank == 1 and step == STEPS // 2:
            fail()
    if handle is not None and "finalize" in way:
        handle.finalize()
    if "barrier" in way:
        dist.barrier()
    if "destroy" in way:
        dist.destroy_process_group()


def fail(*_):
    raise RuntimeError("a rank fails")
