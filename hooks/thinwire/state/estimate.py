"""What a method will send, without running it."""

import torch

from thinwire.core import selection
from thinwire.core.blocks import Layout
from thinwire.core.stats import ring_all_reduce_bytes
from thinwire.methods import DivideAndShuffle, Elastic, Method, block_sparse
from thinwire.methods.base import check_count
from thinwire.state.names import parameter_names


def estimate(method: Method, model: torch.nn.Module, world_size: int, step: int | None = None) -> dict[str, float]:
    """Bytes that each rank sends in a step under DDP, against a dense ring all-reduce.

    step: None is after the ramp. For nominated it is the most, but for a few indices where there are several buckets:
    ranks that name the same block send it once. Under Horovod independent and permuted send the union of all ranks'
    blocks in a ring, which is more. Returns bytes_sent, dense_bytes and compression, as ``stats()`` counts them. A
    block's number takes 4 bytes, and 8 where a bucket (nominated) or a parameter (topk) has more than 2^31 blocks, of
    which the model is taken for one bucket.
    With density="auto" it is that of max_density; Elastic sends what its method sends, but for a few bytes of norms.
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
    method = block_sparse(method.method if isinstance(method, Elastic) else method)
    step = method.warmup_steps + method.ramp_steps if step is None else step
    names = tuple(parameter_names(model).values())
    parameters = list(parameter_names(model))
    numels = tuple(p.numel() for p in parameters)
    slots = Layout(names, numels, method.block_size).slots(method.counts_at(step, world_size, numels))
    peers, width = world_size - 1, method.wire_dtype.itemsize
    narrow = [p.element_size() if method.memory == "none" else width for p in parameters]
    sizes = [end - begin for begin, end in zip(slots.offsets, slots.offsets[1:])]
    widths = [min(width, n) for n in narrow]
    values = sum(size * w for size, w in zip(sizes, widths))
    owned = sum(-(-size // world_size) * w for size, w in zip(sizes, widths))
    chosen = selection.Whole if all(slots.whole) else selection.BY_NAME[method.selection]
    if chosen.common:
        sent = 2 * peers * owned + peers * chosen.asked_bytes(slots, step, world_size)
    else:
        sent = peers * (values + chosen.index_bytes(slots))
    dense = ring_all_reduce_bytes(sum(p.numel() * p.element_size() for p in parameters), world_size)
    return {"bytes_sent": sent, "dense_bytes": dense, "compression": dense / sent if sent else 1.0}
