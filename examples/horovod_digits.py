"""An existing Horovod loop, with thinwire as its compression.

    horovodrun -np 2 --gloo python examples/horovod_digits.py
"""
import argparse

import horovod.torch as hvd
import thinwire
import torch
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

hvd.init()
torch.manual_seed(0)

pixels, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
pixels = pixels.float() / 16
order = torch.randperm(len(labels))
training, held_out = order[:1500], order[1500:]
mine = training[hvd.rank() :: hvd.size()]

model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
handle = thinwire.horovod.Compressor(  # the one line, and compression=handle below
    model.named_parameters(), thinwire.BlockSparse("nominated", density=0.05), optimizer=optimizer
)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), compression=handle)

for step in range(1, args.steps + 1):
    batch = mine[torch.randint(len(mine), (32,))]
    loss = nn.functional.cross_entropy(model(pixels[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if hvd.rank() == 0 and step % 50 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

if hvd.rank() == 0:
    with torch.no_grad():
        accuracy = (model(pixels[held_out]).argmax(1) == labels[held_out]).float().mean()
    stats = handle.stats()
    print(f"accuracy {accuracy:.3f}")
    print(f"{stats['bytes_sent'] / stats['steps']:.0f} bytes sent a step, "
          f"{stats['compression']:.1f} times fewer than plain Horovod")  # fmt: skip
    print(stats)
hvd.shutdown()
