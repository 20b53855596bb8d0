"""Models and training loops that the tests share. Run on ranks, so everything here is seeded."""

import contextlib
import logging
import threading

import thinwire
import torch
import torch.distributed as dist
from thinwire import BlockSparse
from thinwire.core import exchange
from thinwire.local import steps as local_steps
from thinwire.replicas import means
from torch.nn.parallel import DistributedDataParallel

SMALL_BUCKET_MB = 0.005  # a bucket for almost every layer of mlp()

# Every selection with every memory that it allows, at densities at which each is used.
ALL_METHODS = [
    BlockSparse(selection, density=density, memory=memory, block_size=16, dense_below=20)
    for selection, density, memories in (
        ("independent", None, ("none", "error_feedback", "control_variate")),
        ("permuted", None, ("none", "error_feedback", "control_variate")),
        ("shared", 0.3, ("none", "error_feedback", "control_variate")),
        ("topk", 0.1, ("none", "error_feedback")),
        ("nominated", 0.1, ("none", "error_feedback")),
    )
    for memory in memories
] + [
    BlockSparse("topk", density=0.1, block_size=16, momentum=0.9, wire_dtype=torch.bfloat16),
    BlockSparse(
        "nominated", density=0.1, block_size=16, momentum=0.9, wire_dtype=torch.float16, warmup_steps=2, ramp_steps=4
    ),
    BlockSparse("shared", density=0.3, block_size=16, memory="control_variate", wire_dtype=torch.bfloat16),
    BlockSparse("nominated", density=0.1, block_size=16, dense_below=20, wire_dtype="int4"),
    BlockSparse("nominated", density=0.3, block_size=24, momentum=0.9, wire_dtype="int2"),
    BlockSparse("topk", density=0.1, block_size=16, wire_dtype="int8"),
    BlockSparse("independent", memory="error_feedback", block_size=16, wire_dtype="int4"),
    BlockSparse("shared", density=0.3, block_size=16, memory="control_variate", wire_dtype="int4"),
]  # fmt: skip


def label(method):
    return "-".join([method.selection, method.memory, str(method.wire_dtype).removeprefix("torch.")])


def mlp(width=40, layers=6, dtype=torch.float32, seed=0):
    """layers of width x width, with biases; the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [torch.nn.Linear(width, width, dtype=dtype) for _ in range(layers)]
    return torch.nn.Sequential(*[m for block in blocks for m in (block, torch.nn.Tanh())])


def learner(layers=6, dtype=torch.float32):
    """mlp() with orthogonal weights: gradients reach every layer, so that some steps show whether it is trained.

    mlp() itself soon predicts zero, which lowers its loss by 15 %, and stays there.
    """
    model = mlp(layers=layers, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            square = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(torch.linalg.qr(square).Q)
    return model


def data(rank, width=40, dtype=torch.float32, seed=0):
    """An endless stream of batches, different on every rank; targets that can be learned."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    while True:
        x = torch.randn(8, width, generator=generator, dtype=dtype)
        yield x, 0.5 * x.roll(1, dims=1)


def wrap(model, bucket_cap_mb=SMALL_BUCKET_MB, **options):
    return DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb, **options)


def sgd(model, lr=0.05, momentum=0.0):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def step(ddp, optimizer, batch, scale=1.0):
    x, y = batch
    optimizer.zero_grad()
    loss = scale * ((ddp(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def attach(ddp, method, optimizer=None, **options):
    return thinwire.attach(ddp, method, optimizer=optimizer, **options)


def flat(tensors):
    return torch.cat([t.detach().reshape(-1).to(torch.float64) for t in tensors])


def equal_on_all_ranks(tensors):
    """Whether the tensors have the same bits on every rank."""
    mine = torch.cat([t.detach().reshape(-1).contiguous().view(torch.uint8) for t in tensors])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return all(torch.equal(mine, other) for other in everyone)


def local_gradient(model, batch):
    """The gradient of this rank alone, flat, without touching .grad."""
    x, y = batch
    loss = ((model(x) - y) ** 2).mean()
    return torch.autograd.grad(loss, list(model.parameters()))


@contextlib.contextmanager
def logged():
    """The messages that thinwire logs."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("thinwire").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("thinwire").removeHandler(handler)


class Collectives:
    """What thinwire has started on this rank: how many collectives, and how many were under way at most at once."""

    def __init__(self):
        self.started = self.most = self._now = 0
        self._lock = threading.Lock()

    def begin(self):
        with self._lock:
            self.started += 1
            self._now += 1
            self.most = max(self.most, self._now)

    def end(self, _=None):
        with self._lock:
            self._now -= 1


@contextlib.contextmanager
def watched(before=lambda: None):
    """Call ``before`` ahead of every collective that carries tensors, and count them."""
    found = Collectives()
    kept = exchange._all_gather_single, dist.all_to_all_single, dist.all_reduce

    def watching(collective):
        def call(*args, **kwargs):
            before()
            found.begin()
            work = collective(*args, **kwargs)
            if work is None:
                found.end()
            else:
                work.get_future().then(found.end)
            return work

        return call

    exchange._all_gather_single, dist.all_to_all_single, dist.all_reduce = map(watching, kept)
    try:
        yield found
    finally:
        exchange._all_gather_single, dist.all_to_all_single, dist.all_reduce = kept


@contextlib.contextmanager
def in_small_pieces(nbytes=8000):
    """Flat tensors of one or two parameters, as a large model has many; and local steps compare their anchors after
    every round."""
    kept = means.PIECE_BYTES, local_steps.DEBUG
    means.PIECE_BYTES, local_steps.DEBUG = nbytes, True
    try:
        yield
    finally:
        means.PIECE_BYTES, local_steps.DEBUG = kept
