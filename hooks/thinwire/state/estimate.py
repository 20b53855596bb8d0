"""What a method will send, without running it."""

import torch

from thinwire.core import selection
from thinwire.core.blocks import Layout
from thinwire.core.levels import wire_of
from thinwire.core.memory import wide
from thinwire.core.stats import ring_all_reduce_bytes
from thinwire.methods import Dense, DivideAndShuffle, Elastic, LocalSteps, Method, block_sparse
from thinwire.methods.base import check_count
from thinwire.methods.local_steps import AUTO
from thinwire.state.names import float_buffers, parameter_names


def estimate(method: Method, model: torch.nn.Module, world_size: int, step: int | None = None) -> dict[str, float]:
    """Bytes that each rank sends in a step under DDP, against a dense ring all-reduce.

    step: None is after the ramp. For nominated it is the most, but for a few indices where there are several buckets:
    ranks that name the same block send it once. Under Horovod independent and permuted send the union of all ranks'
    blocks in a ring, which is more. Returns bytes_sent, dense_bytes and compression, as ``stats()`` counts them. A
    block's number takes 2 bytes, and 4 or 8 where a parameter of the same bucket has more than 2^16 or 2^31 blocks; the
    model is taken for one bucket.
    With density="auto" it is that of max_density; Elastic sends what its method sends, but for a few bytes of norms.
    Of int8, int4 and int2 a block's scale is counted, and padding where ranks own unequal numbers of blocks.
    Of LocalSteps it is a step's share of its round, averaged buffers included; a step of its warm-up is a dense one.
    Raises TypeError for DivideAndShuffle, whose bytes depend on the round, ValueError for LocalSteps(every="auto"), and
    TypeError or ValueError for what is no model, no number of ranks or no step.
    """
    check_count("estimate", "world_size", world_size, 1)
    if step is not None:
        check_count("estimate", "step", step, 0)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"estimate got a {type(model).__name__} as model: it must be a torch.nn.Module")
    if isinstance(method, DivideAndShuffle):
        raise TypeError(
            "there is no estimate for DivideAndShuffle: a round in a group of s ranks sends 2 (s - 1) / s times what "
            "is averaged"
        )
    parameters = list(parameter_names(model))
    dense = ring_all_reduce_bytes(sum(p.numel() * p.element_size() for p in parameters), world_size)
    sent = (_local_steps if isinstance(method, LocalSteps) else _gradients)(method, model, world_size, step)
    return {"bytes_sent": sent, "dense_bytes": dense, "compression": dense / sent if sent else 1.0}


def _gradients(method, model, world_size, step):
    """Bytes of one step of a method that averages gradients."""
    of_backend = method.of_backend if isinstance(method, Method) else False
    method = block_sparse(method.method if isinstance(method, Elastic) else method)
    named = {name: parameter for parameter, name in parameter_names(model).items()}
    plain = [name for name, p in named.items() if of_backend and p.dtype == torch.float32]
    in_ring = ring_all_reduce_bytes(sum(4 * named.pop(name).numel() for name in plain), world_size)
    return in_ring + _exchanged(method, named, world_size, step)


def _local_steps(method, model, world_size, step):
    """Bytes of one step of local steps: of its round, shared out over the steps."""
    if method.every == AUTO:
        raise ValueError(
            "there is no estimate for LocalSteps(every='auto'), which follows the link: give every as a number, or ask "
            "thinwire.advise, which measures it"
        )
    if step is not None and step < method.warmup_steps:
        return _gradients(Dense(), model, world_size, step)
    parameters = {name: _widened(parameter) for parameter, name in parameter_names(model).items()}
    buffers = {name: _widened(one) for name, one in float_buffers(model)} if method.average_buffers else {}
    if method.group_size is not None:
        ranks = min(method.group_size, world_size)
        nbytes = sum(t.numel() * t.element_size() for t in (*parameters.values(), *buffers.values()))
        alone, together = (ring_all_reduce_bytes(nbytes, n) for n in (ranks, world_size))
        share = 1 / method.global_every if method.global_every else 0
        return ((1 - share) * alone + share * together) / method.every
    every = method.every // method.fragments * method.fragments  # in which each fragment is sent once
    number = None if step is None else (step - method.warmup_steps) // every  # of the round
    of_round = _exchanged(method.method.as_block_sparse(), parameters, world_size, number)
    of_round += _exchanged(Dense().as_block_sparse(), buffers, world_size, None)
    return of_round / every


def _widened(tensor):
    """As it is averaged: differences of 16-bit parameters need more bits than those."""
    return torch.empty_like(tensor, dtype=wide(tensor.dtype), device="meta")


def _exchanged(method, named, world_size, step):
    """Bytes of one exchange of such tensors, by name, under a BlockSparse."""
    step = method.warmup_steps + method.ramp_steps if step is None else step
    tensors = list(named.values())
    numels = tuple(tensor.numel() for tensor in tensors)
    slots = Layout(tuple(named), numels, method.block_size).slots(method.counts_at(step, world_size, numels))
    chosen = selection.Whole if all(slots.whole) else selection.BY_NAME[method.selection]
    wires = _wires(method, tensors)
    if chosen.common:
        rows = sum(sum(wire.row_bytes(_only(slots, mine), world_size)) for wire, mine in wires)
        return (world_size - 1) * (rows + chosen.asked_bytes(slots, step, world_size))
    values = sum(wire.message_bytes(_only(slots, mine), 0) for wire, mine in wires)
    return (world_size - 1) * (values + chosen.index_bytes(slots))


def _wires(method, parameters):
    """The wires that gradients of these parameters travel on, each with the numbers of its parameters."""
    wire = wire_of(method.wire_dtype)
    if method.memory != "none":
        return [(wire, list(range(len(parameters))))]
    dtypes = sorted({p.dtype for p in parameters}, key=str)
    return [(wire.narrowed_to(dtype), [i for i, p in enumerate(parameters) if p.dtype == dtype]) for dtype in dtypes]


def _only(slots, mine):
    """The part of a payload that is of some parameters."""
    layout = slots.layout
    names, numels = tuple(layout.names[i] for i in mine), tuple(layout.numels[i] for i in mine)
    return Layout(names, numels, layout.block_size).slots(tuple(slots.counts[i] for i in mine))
