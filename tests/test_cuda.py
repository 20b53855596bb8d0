"""Hooks on a GPU: what is true of every method on the CPU is true there, with the tensors where training has them.

Ranks share one GPU over Gloo, which carries CUDA tensors, or one rank has it over NCCL, which allows no more; the
operators themselves are compared in test_ops.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import thinwire
import torch
from models import ALL_METHODS, data, equal_on_all_ranks, flat, label, mlp, sgd, wrap
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic, LocalSteps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
OTHERS = [Dense(), Dense(wire_dtype=torch.bfloat16), DivideAndShuffle(group_size=2), Elastic(Dense(), beta=0.5),
          LocalSteps(4), LocalSteps(4, BlockSparse("nominated", density=0.3, memory="weights", wire_dtype="int4")),
          Elastic(BlockSparse("nominated", density=0.1, block_size=16), beta=0.5)]  # fmt: skip


def train(rank, n, method, device, steps=20):
    model = mlp().to(device)
    ddp, optimizer = wrap(model), sgd(model)
    handle = thinwire.attach(ddp, method, optimizer=optimizer) if method is not None else None
    batches, begin = data(rank), flat([p.cpu() for p in model.parameters()])
    for _ in range(steps):
        x, y = (one.to(device) for one in next(batches))
        optimizer.zero_grad()
        loss = ((ddp(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
    if handle is not None:
        handle.finalize()
    equal = equal_on_all_ranks([p.detach().cpu() for p in model.parameters()])
    end = flat([p.detach().cpu() for p in model.parameters()])
    return equal, end, (end - begin).norm()


def name_of(method):
    return label(method) if isinstance(method, BlockSparse) else repr(method)[:50]


@pytest.mark.parametrize("method", ALL_METHODS + OTHERS, ids=name_of)
def test_replicas_are_bitwise_equal_and_near_the_cpus(ranks, method):
    there, here = ranks(2).run(train, method, "cuda"), ranks(2).run(train, method, "cpu")
    assert all(equal for equal, *_ in there)
    (_, gpu, moved), (_, cpu, _) = there[0], here[0]
    assert moved > 20 * (gpu - cpu).norm()  # the two differ in how products are added up, by far less than a step


def test_dense_is_plain_ddp(ranks):
    plain, ours = ranks(2).run(train, None, "cuda")[0][1], ranks(2).run(train, Dense(), "cuda")[0][1]
    assert torch.allclose(plain, ours, rtol=1e-4, atol=1e-6)


def test_nccl_one_rank():
    """The one rank sends what several would, and its host waits for nothing. In a process of its own, because the
    variable that has it send is read when thinwire is imported."""
    script = Path(__file__).with_name("nccl_rank.py")
    environment = {**os.environ, "THINWIRE_EXCHANGE_ALONE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
