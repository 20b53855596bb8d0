"""Divide-and-Shuffle on an existing loop, and stochastic weight averaging over replicas and time at its end.

    torchrun --nproc-per-node 4 examples/shuffle_swa.py
"""
import argparse

import thinwire
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, update_bn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)

images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
order = torch.randperm(len(labels))
training, held_out = order[:1500], order[1500:]
mine = training[rank::world_size]

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32),
    nn.ReLU(), nn.Flatten(), nn.Linear(288, 10),
)  # fmt: skip
ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
handle = thinwire.attach(ddp, thinwire.DivideAndShuffle(), optimizer=optimizer)  # the one line
swa = AveragedModel(model)


def accuracy(network):
    network.eval()
    with torch.no_grad():
        right = (network(images[held_out]).argmax(1) == labels[held_out]).float().mean()
    network.train()
    return right


for step in range(1, args.steps + 1):
    batch = mine[torch.randint(len(mine), (16,))]
    loss = nn.functional.cross_entropy(ddp(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step > args.steps // 2 and step % 10 == 0:
        with handle.evaluating() as mean:  # on every rank
            swa.update_parameters(mean)

update_bn(images[training].split(100), swa)
alone = accuracy(model)
with handle.evaluating() as mean:
    together = accuracy(mean)
if rank == 0:
    print(f"accuracy {accuracy(swa):.3f} of the weights averaged over replicas and time, {together:.3f} over replicas, "
          f"{alone:.3f} of rank 0's replica")  # fmt: skip
    print(handle.stats())
dist.barrier()  # rank 0 was evaluating: on Gloo, a rank that leaves much earlier than another may abort
dist.destroy_process_group()
