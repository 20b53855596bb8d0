"""The operators' contests: each against plain PyTorch, a torch operator and a copy, on a device and at a size.

The gradient is float32, in three parameters of whole blocks of 64, because torch's operators know no ragged ones; an
eighth of the blocks travels, from 4 ranks where several matter. The torch operator is what a user would write; where
it does less than ours (``torch.add`` gives no norms, ``torch.randperm`` no ascending order), it is given the benefit.

*Bytes* are what an operator must read and write at least, each once; tables and status are too small to count. A copy
of half as many, which reads and writes that sum, is the memory's own speed. An operator can beat it: what it changes
in place is in the cache when it is written, while a copy's target may have to be read first.

On a CPU all contestants find the caches as the one before them left them. On a GPU a large buffer is read before each
call: it leaves the L2 cache full of what nobody needs, with nothing to write back, and the host has launched the
call when the device is done with it.
"""
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from thinwire import ops
from thinwire.core.blocks import Layout
from thinwire.ops import reference

MEGABYTES = {"cpu": (1, 26, 256), "cuda": (1, 16, 256, 4000)}  # of the gradient
BLOCK, SHARE, RANKS = 64, 8, 4
NEEDED = 10  # memory for a contest, in gradients: the reference makes several temporaries of a gradient's size
WARM_UP = 3


class Problem:
    """Tensors of one size on one device, made when first asked for."""

    def __init__(self, megabytes, device):
        blocks = megabytes * 10**6 // (4 * BLOCK)
        counts = (blocks - blocks // 4, blocks // 4 - 16, 16)
        self.layout = Layout(("weight", "other", "bias"), tuple(BLOCK * count for count in counts), BLOCK)
        self.slots = self.layout.slots(tuple(count // SHARE for count in counts))
        self.device = torch.device(device)
        self.table, self.units = self.slots.table_on(self.device), self.layout.units_on(self.device)
        self.blocks, self.numel, self.sent = blocks, self.layout.numel, self.slots.total
        self.status = torch.full((len(counts) + 1,), ops.TOUCHED, dtype=torch.int32, device=device)

    @cached_property
    def grad(self):
        return torch.randn(self.numel, device=self.device)

    @cached_property
    def memory(self):
        """A residual, a velocity or the averaged gradient."""
        return torch.randn(self.numel, device=self.device)

    @cached_property
    def norms(self):
        return torch.rand(self.blocks, device=self.device)

    @cached_property
    def payloads(self):
        return torch.randn(RANKS, self.slots.numel, device=self.device)

    @cached_property
    def chosen(self):
        chosen = torch.empty(RANKS, self.sent, dtype=torch.int64, device=self.device)
        ops.draw_blocks(self.table, self.units, BLOCK, 1, 2, range(RANKS), [0] * RANKS, chosen)
        return chosen

    @cached_property
    def rows(self):
        """chosen, counted over the whole gradient as torch's operators need it."""
        first = torch.repeat_interleave(torch.tensor(self.layout.first_blocks[:-1]), torch.tensor(self.slots.counts))
        return self.chosen + first.to(self.device)


@dataclass
class Contest:
    """What one operator is called with, the torch operator's name and call, and the bytes ours must move at least."""

    arguments: tuple
    torch_name: str
    torch_call: Callable
    bytes: int


def accumulate_(p):
    """Reads gradient and residual, writes residual and norms."""
    return Contest((p.memory, None, p.grad, 0.0, p.table, BLOCK, p.norms, p.status),
                   "torch.add", lambda: torch.add(p.memory, p.grad, out=p.memory),
                   4 * (3 * p.numel + p.blocks))  # fmt: skip


def examine(p):
    """Reads the gradient."""
    return Contest((p.grad, p.table, p.status),
                   "isfinite().all() and any()", lambda: (torch.isfinite(p.grad).all(), p.grad.any()),
                   4 * p.numel)  # fmt: skip


def draw_blocks(p):
    """Writes the numbers drawn; its keys are computed, not read."""
    chosen = torch.empty_like(p.chosen[:1])
    return Contest((p.table, p.units, BLOCK, 1, 2, [0], [0], chosen),
                   "torch.randperm", lambda: torch.randperm(p.blocks, device=p.device),
                   8 * p.sent)  # fmt: skip


def select_blocks(p):
    """Reads the norms, writes the numbers chosen."""
    chosen = torch.empty_like(p.chosen[0])
    return Contest((p.norms, p.table, BLOCK, chosen),
                   "torch.topk", lambda: torch.topk(p.norms, p.sent, sorted=False),
                   4 * p.blocks + 8 * p.sent)  # fmt: skip


def gather_blocks(p):
    """Reads the numbers and the chosen blocks, writes the payload."""
    source, rows, payload = p.grad.view(-1, BLOCK), p.rows[0], torch.empty_like(p.payloads[0])
    return Contest((p.grad, p.chosen[0], p.table, BLOCK, p.status, None, payload),
                   "index_select", lambda: torch.index_select(source, 0, rows, out=payload.view(-1, BLOCK)),
                   (8 + 8 * BLOCK) * p.sent)  # fmt: skip


def take_blocks_(p):
    """Reads the numbers and the chosen blocks, writes the payload and what remains of the blocks."""
    source, rows, payload = p.memory.view(-1, BLOCK), p.rows[0], torch.empty_like(p.payloads[0])

    def torch_call():
        torch.index_select(source, 0, rows, out=payload.view(-1, BLOCK))
        source.index_fill_(0, rows, 0)

    return Contest((p.memory, p.chosen[0], p.table, BLOCK, p.status, None, payload),
                   "index_select and index_fill_", torch_call, (8 + 12 * BLOCK) * p.sent)  # fmt: skip


def scatter_blocks_(p):
    """Reads every rank's numbers and payload, writes the whole sum."""
    factors, rows = torch.ones(len(p.slots.counts), device=p.device), p.rows.flatten()
    payloads = p.payloads.view(-1, BLOCK)
    return Contest((p.payloads, None, p.chosen, p.table, BLOCK, factors, False, p.memory),
                   "zero_ and index_add_", lambda: p.memory.zero_().view(-1, BLOCK).index_add_(0, rows, payloads),
                   RANKS * (8 + 4 * BLOCK) * p.sent + 4 * p.numel)  # fmt: skip


def settle_(p):
    """After a good step: reads the numbers, writes velocity in the chosen blocks. Residual and gradient rest."""
    velocity, rows, good = p.memory.view(-1, BLOCK), p.rows[0], torch.zeros(1, dtype=torch.int32, device=p.device)
    return Contest((p.grad, p.memory, p.grad, 0.9, p.payloads[0], None, p.chosen[0], p.table, BLOCK, p.status, good),
                   "index_fill_", lambda: velocity.index_fill_(0, rows, 0),
                   (8 + 4 * BLOCK) * p.sent)  # fmt: skip


OPERATORS = {contest.__name__: contest for contest in (
    accumulate_, examine, draw_blocks, select_blocks, gather_blocks, take_blocks_, scatter_blocks_, settle_,
)}  # fmt: skip


def why_not(device: str, megabytes: int) -> str | None:
    """Why nothing of this size can be measured on the device, or None where it can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not ops.native(device):
        return ops.why_not_native() or f"thinwire was built without operators for {device}"
    needed, free = NEEDED * megabytes / 1e3, _free_memory(device) / 1e9
    return f"{needed:.3g} GB are needed and {free:.3g} GB free" if needed > free else None


def contestants(name: str, problem: Problem) -> tuple[Contest, dict[str, Callable]]:
    """An operator's contest, and what is to be timed: "ours", "torch", "copy" and, slowest, "reference"."""
    contest = OPERATORS[name](problem)
    ours, plain = getattr(ops, name), getattr(reference, name)
    source = torch.ones(max(1, contest.bytes // 8), device=problem.device)
    target = torch.empty_like(source)
    return contest, {
        "ours": lambda: ours(*contest.arguments), "torch": contest.torch_call,
        "copy": lambda: target.copy_(source), "reference": lambda: plain(*contest.arguments),
    }  # fmt: skip


def fastest_of_each(functions, slow=(), turns=5, seconds=2.0, device="cpu"):
    """Seconds that each of functions and of slow takes at best; all are called in turns.

    After so many turns the slow ones drop out, and the others go on for so many seconds. On a GPU times are those
    between CUDA events, after a warm-up.
    """
    everyone = [*functions, *slow]
    time_once = _cuda_timer(everyone) if device == "cuda" else _time_on_cpu
    best = [float("inf")] * len(everyone)

    def take_turns(count):
        for i, function in enumerate(everyone[:count]):
            best[i] = min(best[i], time_once(function))

    for _ in range(turns):
        take_turns(len(everyone))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        take_turns(len(functions))
    return best


def _time_on_cpu(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_timer(functions):
    for _ in range(WARM_UP):
        for function in functions:
            function()
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    unneeded = torch.zeros(max(2 * l2, 512 << 20) // 4, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def time_once(function):
        unneeded.sum()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return time_once


def _free_memory(device):
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def device_name(device: str) -> str:
    """A GPU's name. Of a CPU, whose name belongs to the machine, how many threads torch has there."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''}"
