"""What a method will send, without running it."""

import torch

from thinwire.core import selection
from thinwire.core.blocks import Layout
from thinwire.core.levels import wire_of
from thinwire.core.stats import ring_all_reduce_bytes
from thinwire.methods import DivideAndShuffle, Elastic, Method, block_sparse
from thinwire.methods.base import check_count
from thinwire.state.names import parameter_names


def estimate(method: Method, model: torch.nn.Module, world_size: int, step: int | None = None) -> dict[str, float]:
    """Bytes that each rank sends in a step under DDP, against a dense ring all-reduce.

    step: None is after the ramp. For nominated it is the most, but for a few indices where there are several buckets:
    ranks that name the same block send it once. Under Horovod independent and permuted send the union of all ranks'
    blocks in a ring, which is more. Returns bytes_sent, dense_bytes and compression, as ``stats()`` counts them. A
    block's number takes 2 bytes, and 4 or 8 where a parameter of the same bucket has more than 2^16 or 2^31 blocks; the
    model is taken for one bucket.
    With density="auto" it is that of max_density; Elastic sends what its method sends, but for a few bytes of norms.
    Of int8, int4 and int2 a block's scale is counted, and padding where ranks own unequal numbers of blocks.
    Raises TypeError for DivideAndShuffle, whose bytes depend on the round, and TypeError or ValueError for what is no
    model, no number of ranks or no step.
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
    of_backend = method.of_backend if isinstance(method, Method) else False
    method = block_sparse(method.method if isinstance(method, Elastic) else method)
    step = method.warmup_steps + method.ramp_steps if step is None else step
    names = tuple(parameter_names(model).values())
    parameters = list(parameter_names(model))
    numels = tuple(p.numel() for p in parameters)
    slots = Layout(names, numels, method.block_size).slots(method.counts_at(step, world_size, numels))
    peers = world_size - 1
    chosen = selection.Whole if all(slots.whole) else selection.BY_NAME[method.selection]
    dense = ring_all_reduce_bytes(sum(p.numel() * p.element_size() for p in parameters), world_size)
    wires = _wires(method, parameters)
    plain = [p for p in parameters if of_backend and p.dtype == torch.float32]
    if plain:
        wires = [(wire, mine) for wire, mine in wires if parameters[mine[0]].dtype != torch.float32]
    if chosen.common:
        rows = sum(sum(wire.row_bytes(_only(slots, mine), world_size)) for wire, mine in wires)
        sent = peers * (rows + chosen.asked_bytes(slots, step, world_size))
        sent += ring_all_reduce_bytes(sum(4 * p.numel() for p in plain), world_size)
    else:
        values = sum(wire.message_bytes(_only(slots, mine), 0) for wire, mine in wires)
        sent = peers * (values + chosen.index_bytes(slots))
    return {"bytes_sent": sent, "dense_bytes": dense, "compression": dense / sent if sent else 1.0}


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
