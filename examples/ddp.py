"""An existing DistributedDataParallel loop, with the one line of thinwire added.

    torchrun --nproc-per-node 2 examples/ddp.py
    python benchmarks/thinnet.py --ranks 4 --mbit 10 -- python examples/ddp.py
"""
import argparse

import thinwire
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)

pixels, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
pixels = pixels.float() / 16
order = torch.randperm(len(labels))
training, held_out = order[:1500], order[1500:]
mine = training[rank::world_size]

model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.2)
handle = thinwire.attach(ddp, thinwire.BlockSparse("nominated", density=0.05), optimizer=optimizer)  # the one line

for step in range(1, args.steps + 1):
    batch = mine[torch.randint(len(mine), (32,))]
    loss = nn.functional.cross_entropy(ddp(pixels[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if rank == 0 and step % 50 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

if rank == 0:
    with torch.no_grad():
        accuracy = (model(pixels[held_out]).argmax(1) == labels[held_out]).float().mean()
    stats = handle.stats()
    print(f"accuracy {accuracy:.3f}")
    print(f"{stats['bytes_sent'] / stats['steps']:.0f} bytes sent a step, "
          f"{stats['compression']:.1f} times fewer than plain DDP")  # fmt: skip
    print(stats)
dist.barrier()  # rank 0 was evaluating: on Gloo, a rank that leaves much earlier than another may abort
dist.destroy_process_group()
