"""The front door for Horovod: a compressor for ``hvd.DistributedOptimizer(..., compression=...)``.

Horovod adds up, element by element, whatever the compressor gives it, so every rank must give the same blocks. Where
ranks choose different blocks that all can compute (independent, permuted) they send the slots of the union. Nominated
needs the ranks to talk before they know their blocks, which must not happen inside ``compress``: Horovod may call it
in another order on another rank. It sends one element there, and does its own exchange, of all parameters at once, in
the first ``decompress`` of the step. Elastic does so with any selection: see ``elastic.py``. What is summed by its
owners and not by Horovod, in int8, int4 and int2, can only travel there: so those work with nominated.
"""
import json
import logging
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from thinwire.core.channel import Channel
from thinwire.core.memory import Pass
from thinwire.core.reducer import Encoded
from thinwire.core.selection import BY_NAME
from thinwire.core.stats import Stats, ring_all_reduce_bytes
from thinwire.core.wire import Arrived, SummableFloat, SummableHalf
from thinwire.horovod.links import HorovodLinks
from thinwire.horovod.stock import hvd, require
from thinwire.methods import Dense, Method
from thinwire.state.cautions import caution
from thinwire.state.checks import check_gradient, check_momentum, check_optimizer_type
from thinwire.state.gradients import GradientHandle

_log = logging.getLogger("thinwire")


@dataclass
class _InFlight:
    """One parameter's gradient between compress and decompress; encoded is None where decompress does the work.

    was: what was in it of earlier passes of the same step, which is not averaged again.
    """

    name: str
    grad: torch.Tensor
    was: torch.Tensor | None = None
    encoded: Encoded | None = None
    over: tuple | None = None
    since: float = 0.0


class GradientCompressor(GradientHandle):
    """A method at work in one ``hvd.DistributedOptimizer``; what ``thinwire.horovod.Compressor`` gives.

    Both op=Average and op=Sum work, with the meaning that they have without a compressor. Horovod adds in the wire
    dtype: with float16, values are divided by the number of ranks beforehand and saturate at 32768 (error feedback
    keeps the rest; a warning says so otherwise), and what the additions round off is lost. With "int8", "int4" and
    "int2", which work with nominated, sums are in float32 and in rank order as with DDP, and nothing is lost. bfloat16
    gradients, which Horovod itself refuses, travel in the wire dtype.

    Raises TypeError or ValueError for what cannot work, ImportError without Horovod.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, torch.Tensor]], method: Method, *, process_set: Any = None,
                 optimizer: torch.optim.Optimizer | None = None, grad_scaler: torch.amp.GradScaler | None = None,
                 consistency_every: int = 0, log: Any = None, runs: Method | None = None):  # fmt: skip
        require()
        super().__init__(method, grad_scaler, consistency_every, log, runs)
        runs = method if runs is None else runs
        selection = BY_NAME[self._block_sparse.selection]
        if selection.sends_indices:
            raise ValueError(
                f"BlockSparse(selection={self._block_sparse.selection!r}) gives every rank blocks that the others "
                "cannot know, and Horovod's all-reduce needs the same ones on all: use selection='nominated'"
            )
        if self._block_sparse.wire_dtype == torch.bfloat16:
            raise ValueError(
                f"{type(runs).__name__}(wire_dtype=torch.bfloat16): Horovod cannot all-reduce bfloat16; use "
                "torch.float16 or torch.float32"
            )
        self._check_sums(runs, selection)
        check_optimizer_type(optimizer)
        check_momentum(runs, optimizer)
        self._sees_steps = optimizer is not None
        self._set = hvd.global_process_set if process_set is None else process_set
        self._parameters = _trainable(named_parameters)
        self._passes = dict.fromkeys((name for name, _ in self._parameters), 0)
        self._next = 0
        self._defers = selection.talks
        self._deferred: dict[str, _InFlight] = {}
        self._averaged: dict[str, torch.Tensor] = {}
        self._warned = False
        if self._set.included():
            n = self._set.size()
            self._start({name: p.numel() for name, p in self._parameters}, self._set.rank(), n, self._wire(n))
            caution(runs, optimizer, n)

    _may_be_zero = False

    def _check_sums(self, runs, selection):
        """Raise ValueError for what Horovod cannot add up, where it is Horovod that has to."""
        wire_dtype = self._block_sparse.wire_dtype
        if isinstance(wire_dtype, str) and not self._sums_itself(selection):
            raise ValueError(
                f"{type(runs).__name__}(wire_dtype={wire_dtype!r}) with Horovod: Horovod adds up what the ranks send, "
                f"and {wire_dtype} has a scale for each block, so sums of its numbers mean nothing. "
                "BlockSparse(selection='nominated'), without Elastic, makes an exchange of its own and works with "
                f"{wire_dtype}; else use torch.float16 or torch.float32"
            )
        if isinstance(runs, Dense) and runs.exact:
            raise ValueError(
                "Dense(exact=True) with Horovod: Horovod adds up in an order of its own; leave exact out, or use "
                "thinwire.attach with DistributedDataParallel"
            )

    def _sums_itself(self, selection):
        """Whether the exchange is ours."""
        return selection.talks

    def _wire(self, n):
        """None where it is the method's own."""
        wire_dtype = self._block_sparse.wire_dtype
        if isinstance(wire_dtype, str):
            return None
        return SummableHalf(n) if wire_dtype == torch.float16 else SummableFloat(n)

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, _InFlight | None]:
        """The gradient of one of the named parameters as what Horovod is to add up; called by Horovod."""
        if self.closed:
            return tensor, None
        begin = time.perf_counter()
        if not self._agreed:
            self._check_process_set()
        if self._steps is None:
            # Horovod steps another optimizer than the one that it was given.
            self._watch({p: name for name, p in self._parameters},
                        self._calling_optimizer() if self._sees_steps else None)  # fmt: skip
        self._agree(self._gather_objects)
        name, parameter = self._owner_of(tensor)
        step = self._count_step(name)
        was = None if self._steps is None else self._steps.take_in([parameter], self._may_be_zero).get(0)
        if was is not None:
            tensor -= was
        self._note_gradient(tensor, step)
        self._stats.dense_bytes += self._ring_bytes(tensor)
        if self._defers:
            self._deferred[name] = _InFlight(name, tensor, was)
            one = torch.ones(1, device=tensor.device)
            self._stats.count_bytes(self._ring_bytes(one))
            return one, self._deferred[name]
        encoded, values, over = self._encode(tensor.reshape(-1), (name,), (tensor.numel(),), step, was is not None)
        if values is encoded.payload.values and self._block_sparse.memory != "none":
            values = values.clone()  # Horovod adds up in place, and memory is still to be told what was sent
        now = time.perf_counter()
        self._stats.encode_s += now - begin
        return values, _InFlight(name, tensor, was, encoded, over, now)

    def decompress(self, tensor: torch.Tensor, context: _InFlight | None) -> torch.Tensor:
        """The averaged gradient from what Horovod added up; called by Horovod."""
        if context is None and self.closed:
            return tensor
        if context is None:
            raise TypeError("a gradient is sparse: make its module with sparse=False; thinwire needs dense ones")
        if self._steps is not None:
            self._steps.end_pass()
        averaged = self._averaged_of(tensor, context).view(context.grad.shape)
        return averaged if context.was is None else averaged.add_(context.was)

    def state_dict(self) -> dict:
        if self._reducer is None:
            raise RuntimeError(f"state_dict(): this rank is not in {self._set}, so it has no state")
        return super().state_dict()

    def _put_back(self, shard):
        super()._put_back(shard)
        self._passes = dict.fromkeys(self._passes, self._step)

    def _averaged_of(self, tensor, context):
        """A parameter's averaged gradient, from what Horovod added up."""
        if context.encoded is None:
            if context.name not in self._averaged:
                self._exchange_deferred(round(float(tensor)))  # gradient_predivide_factor leaves rounding errors
            return self._averaged.pop(context.name)
        begin = time.perf_counter()
        self._stats.exchange_s += begin - context.since
        self._decode(context.encoded, tensor, context.over, 1.0)
        self._stats.decode_s += time.perf_counter() - begin
        return context.encoded.reading.grad

    def _count_step(self, name):
        """The number of the step that this parameter begins; parameters begin a step one after the other."""
        step = self._passes[name]
        self._passes[name] = step + 1
        if step == self._step:
            self._begin_step()
            if self._steps is not None:
                self._steps.begin_pass()
            self._step += 1
            self._stats.steps += 1
        return step

    def _exchange_deferred(self, ones_added):
        """Exchange all gradients of this step at once; the element each rank sent tells the op: n for Sum, else 1."""
        for group in self._take_deferred():
            begin = time.perf_counter()
            flat = torch.cat([one.grad.reshape(-1) for one in group])
            names = tuple(one.name for one in group)
            numels = tuple(one.grad.numel() for one in group)
            again = any(one.was is not None for one in group)
            step = self._passes[names[0]] - 1
            if isinstance(self._block_sparse.wire_dtype, str):
                self._carry(flat, names, numels, step, again, self._set.size() / ones_added)
                self._averaged.update(zip(names, flat.split(numels), strict=True))
                continue
            encoded, values, over = self._encode(flat, names, numels, step, again)
            sending = time.perf_counter()
            total = hvd.allreduce(values, op=hvd.Sum, name="thinwire.payload", process_set=self._set)
            arriving = time.perf_counter()
            self._decode(encoded, total, over, self._set.size() / ones_added)
            self._averaged.update(zip(names, flat.split(numels), strict=True))
            self._stats.encode_s += sending - begin
            self._stats.exchange_s += arriving - sending
            self._stats.decode_s += time.perf_counter() - arriving

    def _carry(self, flat, names, numels, step, again, divide_by):
        """Average flat [N] over its owners."""
        stats = Stats()
        channel = Channel(HorovodLinks(self._set), self._reducer, stats)
        of = Pass(None if self._steps is None else self._steps.number, again)
        channel.carry([channel.encode(flat, names, numels, step, self._density_at(step), of)], divide_by)
        stats.dense_bytes = 0  # compress has counted them
        self._stats.add(**{name: amount for name, amount in asdict(stats).items() if amount})

    def _take_deferred(self):
        """The gradients of this step, in lists of one dtype and device each, by name: the same on every rank."""
        deferred, self._deferred = self._deferred, {}
        kinds: dict[tuple[str, str], list[_InFlight]] = {}
        for name in sorted(deferred):
            grad = deferred[name].grad
            kinds.setdefault((str(grad.dtype), str(grad.device)), []).append(deferred[name])
        return [kinds[kind] for kind in sorted(kinds)]

    def _encode(self, flat, names, numels, step, again):
        """Encoded, the values that Horovod is to add up, and over: see Reducer.decode. One parameter, where ranks
        choose different blocks. again: see memory.Pass."""
        of = Pass(None if self._steps is None else self._steps.number, again)
        encoded = self._reducer.encode(flat, names, numels, step, self._gather_now, self._density_at(step), of)
        values, over = encoded.payload.values, None
        if not encoded.choice.common:
            values, over = _widen_to_union(encoded)
        self._note_sent(names[0], encoded, values)
        return encoded, values, over

    def _decode(self, encoded, total, over, divide_by):
        scale = encoded.payload.scale
        inverses = None if scale is None else (1 / scale).reshape(1)
        self._reducer.decode(encoded, Arrived(total[None], inverses), over=over, divide_by=divide_by)

    def _owner_of(self, tensor):
        """Name and parameter whose gradient this is. Horovod does not say, and ids of gradients are used again."""
        for i in range(len(self._parameters)):
            name, parameter = self._parameters[self._next - i]
            if parameter.grad is tensor:
                self._next -= i + 1  # backward runs through the parameters from the last to the first
                self._next %= len(self._parameters)
                return name, parameter
        raise ValueError(
            f"compress got a tensor of shape {tuple(tensor.shape)} that is no named parameter's gradient: give "
            "Compressor the named_parameters of the model that this optimizer trains (op=Adasum and sparse_as_dense, "
            "which hand over something else, do not work with it)"
        )

    def _note_sent(self, name, encoded, values):
        self._stats.count_bytes(self._ring_bytes(values))
        wire = encoded.wire
        if self._warned or not wire.saturates or self._block_sparse.memory != "none":
            return
        if (values.abs() >= wire.limit * float(encoded.payload.scale)).any():
            self._warned = True
            _log.warning("thinwire: gradients of %s exceed %g and were cut off there: use wire_dtype=torch.float32 or "
                         "memory='error_feedback'", name, wire.limit)  # fmt: skip

    def _ring_bytes(self, tensor):
        return ring_all_reduce_bytes(tensor.numel() * tensor.element_size(), self._set.size())

    def _gather_now(self, values):
        self._stats.count_bytes((self._set.size() - 1) * values.numel() * values.element_size())
        return hvd.allgather(values[None], name="thinwire.nominations", process_set=self._set)

    def _gather_numbers(self, values):
        return hvd.allgather(values[None], name="thinwire.consistency", process_set=self._set)

    def _gather_objects(self, thing):  # hvd.allgather_object knows no process sets
        text = torch.tensor(list(json.dumps(thing).encode()), dtype=torch.uint8, device="cpu")
        lengths = hvd.allgather(torch.tensor([len(text)], device="cpu"), name="thinwire.lengths", process_set=self._set)
        texts = hvd.allgather(text, name="thinwire.agree", process_set=self._set)
        return [json.loads(bytes(one.tolist())) for one in texts.split(lengths.tolist())]

    def _check_process_set(self):
        """Raise ValueError where the optimizer has another process set: waiting for its other ranks would not end."""
        optimizer = self._calling_optimizer()
        theirs = getattr(optimizer, "process_set", hvd.global_process_set)
        if optimizer is not None and theirs.process_set_id != self._set.process_set_id:
            raise ValueError(
                f"the DistributedOptimizer has process_set={theirs} and its Compressor has {self._set}: give "
                "both the same process_set"
            )

    def _calling_optimizer(self):
        """Horovod does not say whom it calls for; its optimizer is the ``self`` of one of the callers.

        Walking the frames is the one way: Horovod makes its optimizer after its compressor, tells it nothing, keeps no
        list of what it made, and the first collective, before which this must be known, is in its first call.
        """
        frame = sys._getframe(2)
        for _ in range(6):
            optimizer = frame and frame.f_locals.get("self")
            if getattr(optimizer, "_compression", None) is self:
                return optimizer
            frame = frame and frame.f_back
        return None


def _trainable(named_parameters):
    """Names and parameters, in order. Raises TypeError or ValueError for what is not named_parameters()."""
    pairs = list(named_parameters)
    if any(not isinstance(pair, tuple) for pair in pairs):
        raise TypeError("named_parameters must give (name, parameter) tuples, as model.named_parameters() does")
    pairs = [(name.replace("_orig_mod.", ""), p) for name, p in pairs if p.requires_grad]
    if not pairs:
        raise ValueError("named_parameters gave no trainable parameter; an iterator gives each only once: call it anew")
    for name, parameter in pairs:
        check_gradient(name, parameter)
    return pairs


def _widen_to_union(encoded):
    """Own blocks among the blocks that any rank sends: values [P'], and shape and blocks [1, K'] of the union."""
    slots, own = encoded.choice.slots, encoded.choice.own
    union = torch.unique(encoded.choice.rows(None))
    wider = slots.layout.slots((union.numel(),))
    block_size = slots.layout.block_size
    values = encoded.payload.values.new_zeros(union.numel(), block_size)
    values[torch.searchsorted(union, own)] = encoded.payload.values.view(-1, block_size)
    return values.view(-1)[: wider.numel], (wider, union[None])
