"""One rank of NCCL trains under every method while the host may not wait for the GPU. test_cuda.py starts it.

THINWIRE_EXCHANGE_ALONE=1 has the one rank send what several would. Without a GPU it runs over Gloo, which shows that it
would.
"""
import contextlib
import sys
import tempfile

import thinwire
import torch
import torch.distributed as dist
from models import ALL_METHODS, SMALL_BUCKET_MB, data, flat, mlp, sgd
from thinwire import BlockSparse, Dense, LocalSteps
from torch.nn.parallel import DistributedDataParallel

FREE, WATCHED = 6, 6  # steps: DDP makes its buckets anew after the first, and plans are made where they are first used
METHODS = [method for method in ALL_METHODS if not getattr(method, "warmup_steps", 0)] + [
    Dense(), Dense(wire_dtype=torch.bfloat16), Dense(wire_dtype="int4", memory="error_feedback"),
    BlockSparse("nominated", density=0.1, block_size=16, wire_dtype="int4"),
    BlockSparse("topk", density=0.1, block_size=16, wire_dtype="int8"),
    LocalSteps(2, overlap=1), LocalSteps(3, Dense(), overlap=0),
    LocalSteps(3, BlockSparse("nominated", density=0.3, block_size=16, memory="weights", wire_dtype="int4"), overlap=2),
]  # fmt: skip


@contextlib.contextmanager
def waits_forbidden(device):
    """Whatever makes the host wait for the GPU raises RuntimeError."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(method, device, group):
    """The parameters before and after, on the CPU."""
    model = mlp().to(device)
    parameters = list(model.parameters())
    begin = flat([p.cpu() for p in parameters])
    ddp = DistributedDataParallel(model, process_group=group, bucket_cap_mb=SMALL_BUCKET_MB)
    optimizer = sgd(model)
    handle = thinwire.attach(ddp, method, optimizer=optimizer)
    batches = [tuple(one.to(device) for one in batch) for batch, _ in zip(data(0), range(FREE + WATCHED))]

    def step(x, y):
        optimizer.zero_grad()
        ((ddp(x) - y) ** 2).mean().backward()
        optimizer.step()

    for batch in batches[:FREE]:
        step(*batch)
    with waits_forbidden(device):
        for batch in batches[FREE:]:
            step(*batch)
    handle.finalize()
    return begin, flat([p.detach().cpu() for p in parameters])


def main():
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        on_cpu = dist.new_group(backend="gloo")
        for method in METHODS:
            try:
                begin, there = train(method, device, dist.group.WORLD)
            except RuntimeError as error:
                wrong.append(f"{method}: {error}")
                continue
            _, here = train(method, torch.device("cpu"), on_cpu)
            moved, apart = (there - begin).norm(), (there - here).norm()
            if not moved > 4 * apart:  # the two round differently, by far less than what a method changes
                wrong.append(f"{method}: moved by {moved:.3g}, and {apart:.3g} from where the CPU comes")
        dist.destroy_process_group()
    print("\n".join(wrong) or f"{len(METHODS)} methods trained on {device.type} over {backend}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
