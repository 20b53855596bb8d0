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
BITS = 4  # of the operators on coded blocks
LARGEST_FOR_REFERENCE = {"cpu": 256, "cuda": 256}  # MB: beyond, a call of it takes many seconds
NEEDED = 10  # memory for a contest, in gradients: the reference makes several temporaries of a gradient's size
WARM_UP = 3


class Problem:
    """Tensors of one size on one device, made when first asked for."""

    def __init__(self, megabytes, device):
        self.megabytes = megabytes
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
    def coded(self):
        """What each rank sends in few bits, as bytes."""
        return torch.randint(256, (RANKS, self.sent * (2 + ops.code_bytes(BLOCK, BITS))), dtype=torch.uint8,
                             device=self.device)  # fmt: skip

    @cached_property
    def codes(self):
        """The codes of one rank as torch can hold them, a byte each, and their scales."""
        codes = torch.randint(-7, 8, (self.sent, BLOCK), dtype=torch.int8, device=self.device)
        return codes, torch.rand(self.sent, 1, device=self.device)

    @cached_property
    def places(self):
        """Of the slots with their owners, and the slots of an owner."""
        row_slots = sum(-(-count // RANKS) for count in self.slots.counts)
        places, turns = torch.empty_like(self.chosen[0]), torch.zeros(len(self.slots.counts), dtype=torch.int64)
        ops.place_slots(self.table, BLOCK, turns.to(self.device), RANKS, row_slots, places)
        return places, row_slots

    @cached_property
    def shares(self):
        """Where each parameter's share begins in an owner's row, and the row's length."""
        shares = torch.tensor([0, *(-(-BLOCK * count // RANKS) for count in self.slots.counts)])
        return shares.cumsum(0)[:-1].to(self.device), int(shares.sum())

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


def quantise_blocks_(p):
    """Reads the numbers and the chosen blocks, writes codes and what they leave of the blocks."""
    source, rows, coded = p.memory.view(-1, BLOCK), p.rows[0], torch.empty_like(p.coded[:1])

    def torch_call():
        blocks = torch.index_select(source, 0, rows)
        scale = blocks.abs().amax(1, keepdim=True) / 7
        codes = (blocks / scale).round().to(torch.int8)
        source.index_copy_(0, rows, blocks - codes * scale)

    return Contest((p.memory, p.chosen[0], p.table, BLOCK, p.status, None, BITS, True, coded),
                   "index_select, amax, div, index_copy_", torch_call,
                   (8 + 8 * BLOCK) * p.sent + coded.numel())  # fmt: skip


def unquantise_blocks(p):
    """Reads codes, writes a payload."""
    payload, (codes, scales) = torch.empty_like(p.payloads[:1]), p.codes
    return Contest((p.coded[:1], BITS, None, p.table, BLOCK, payload),
                   "torch.mul of int8", lambda: torch.mul(codes, scales, out=payload.view(-1, BLOCK)),
                   p.coded[0].numel() + 4 * payload.numel())  # fmt: skip


def add_quantised(p):
    """Reads every rank's codes, writes their sum."""
    total, (codes, scales) = torch.empty_like(p.payloads[0]), p.codes
    codes, scales = codes.expand(RANKS, -1, -1), scales.expand(RANKS, -1, -1)
    return Contest((p.coded, BITS, BLOCK, total),
                   "mul of int8 and sum", lambda: torch.sum(codes * scales, 0),
                   p.coded.numel() + 4 * total.numel())  # fmt: skip


def add_rows_(p):
    """One owner of four: reads numbers, places and its values, changes its blocks."""
    places, row_slots = p.places
    values, mine = p.payloads[0][: row_slots * BLOCK], p.rows[0][::RANKS]
    out, some = p.memory.view(-1, BLOCK), p.payloads[0].view(-1, BLOCK)[: p.rows[0][::RANKS].numel()]
    good = torch.zeros(1, dtype=torch.int32, device=p.device)
    return Contest((values, places, 0, p.chosen[0], p.table, BLOCK, -1.0, good, p.memory),
                   "index_add_", lambda: out.index_add_(0, mine, some, alpha=-1.0),
                   16 * p.sent + 12 * BLOCK * row_slots)  # fmt: skip


def deal_elements(p):
    """Reads a payload, writes its owners' rows."""
    begins, part = p.shares
    rows, source = torch.empty(RANKS, part, device=p.device), p.payloads[0]
    return Contest((source, p.table, BLOCK, begins, rows),
                   "copy_", lambda: rows.view(-1)[: source.numel()].copy_(source), 4 * (source.numel() + rows.numel()))


def undeal_elements(p):
    """Reads the owners' rows, writes a payload."""
    begins, part = p.shares
    rows, to = torch.ones(RANKS, part, device=p.device), torch.empty_like(p.payloads[0])
    return Contest((rows, p.table, BLOCK, begins, to),
                   "copy_", lambda: to.copy_(rows.view(-1)[: to.numel()]), 8 * to.numel())  # fmt: skip


def unite_blocks(p):
    """Reads what four ranks name, a quarter of the blocks sent each, writes the union's numbers."""
    named = p.rows[:, ::RANKS].to(torch.int32).contiguous()
    united, chosen = torch.empty_like(p.table), torch.empty(named.numel(), dtype=torch.int64, device=p.device)
    return Contest((named, p.table, BLOCK, chosen, united),
                   "torch.unique", lambda: torch.unique(named), 4 * named.numel() + 8 * chosen.numel())  # fmt: skip


def place_slots(p):
    """Writes a number a slot."""
    places, turns = torch.empty_like(p.chosen[0]), torch.zeros(len(p.slots.counts), dtype=torch.int64, device=p.device)
    slot = torch.arange(p.sent, device=p.device)
    return Contest((p.table, BLOCK, turns, RANKS, p.places[1], places),
                   "arange % ranks", lambda: slot % RANKS * p.places[1] + slot // RANKS, 8 * p.sent)  # fmt: skip


OPERATORS = {contest.__name__: contest for contest in (
    accumulate_, examine, draw_blocks, select_blocks, gather_blocks, take_blocks_, scatter_blocks_, settle_,
    quantise_blocks_, unquantise_blocks, add_quantised, add_rows_, deal_elements, undeal_elements, unite_blocks,
    place_slots,
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


def measure(name: str, problem: Problem, seconds: float = 0.8) -> dict:
    """An operator's speed and those of the others, in so many seconds of each after a warm-up, as a table wants it."""
    contest, functions = contestants(name, problem)
    device, megabytes = problem.device.type, problem.megabytes
    slow = [functions.pop("reference")]
    if megabytes > LARGEST_FOR_REFERENCE[device]:
        slow = []
    turns = min(50, max(2, 100 // megabytes))  # of the reference, which takes 1 s to 2 s at 256 MB on a CPU
    best = fastest_of_each(list(functions.values()), slow, turns, seconds, device)
    took = dict(zip([*functions, "reference"], best))
    ours = took["ours"]
    return {
        "name": name, "device": device, "on": device_name(device), "torch": torch.__version__,
        "megabytes": megabytes, "bytes": contest.bytes, "torch_operator": contest.torch_name, "seconds": took,
        "gb_per_second": contest.bytes / ours / 1e9, "of_copy": took["copy"] / ours,
        "over_reference": took["reference"] / ours if slow else None, "over_torch": took["torch"] / ours,
    }  # fmt: skip


def in_words(found: dict) -> str:
    """What :func:`measure` found, in a line."""
    reference = "" if found["over_reference"] is None else f", {found['over_reference']:.3g} times the reference"
    return ("{name}, {megabytes} MB {device}: {gb_per_second:.3g} GB/s, {of_copy:.2f} of a copy, {over_torch:.3g} "
            "times {torch_operator}".format(**found) + reference)  # fmt: skip


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
