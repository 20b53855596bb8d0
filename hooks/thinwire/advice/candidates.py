"""What advise can predict: PyTorch's own hooks and thinwire's methods, each as a hook to rehearse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist

from thinwire.advice.rehearsal import Echo, EchoLinks, Hook
from thinwire.core.beside import Waves
from thinwire.core.channel import Channel
from thinwire.core.reducer import Reducer
from thinwire.core.stats import Stats
from thinwire.local.checks import check_local
from thinwire.methods import BlockSparse, Dense, DivideAndShuffle, Elastic, LocalSteps, Method, block_sparse
from thinwire.methods.local_steps import AUTO
from thinwire.methods.schedules import Hosts, default_group_size
from thinwire.replicas.agreement import check_optimizer

PLAIN = "plain DDP"
_CASTS = {"fp16": "fp16_compress_hook", "bf16": "bf16_compress_hook"}
_POWERSGD = "powersgd-"


@dataclass(frozen=True)
class Candidate:
    """label: for people. what: as it was given to advise. make: the hook over an Echo, or None where gradients stay
    where they are. skipped: steps before the hook does what it does for good. one_bucket: it needs one."""

    label: str
    what: Method | str
    make: Callable[[Echo], Hook] | None
    skipped: int = 1
    one_bucket: bool = False


def plain() -> Candidate:
    return Candidate(PLAIN, PLAIN, _default_hook("allreduce_hook"))


def by_default(world_size: int, gloo: bool) -> tuple[Method | str, ...]:
    """What is worth asking about. Elastic is not among it: what is late depends on the gradients."""
    found = ["fp16", *([] if gloo else ["bf16"]), "powersgd-1", "powersgd-4", Dense(wire_dtype=torch.bfloat16),
             BlockSparse(), BlockSparse("permuted"), BlockSparse("shared", density=1 / world_size),
             Dense(wire_dtype="int4", memory="error_feedback"), BlockSparse("topk", density=0.01),
             BlockSparse("nominated", density=0.01), BlockSparse("nominated", density=0.04),
             BlockSparse("nominated", density=0.04, wire_dtype="int4"), LocalSteps(every=AUTO)]  # fmt: skip
    if world_size > 2 and world_size % 2 == 0:
        found.append(DivideAndShuffle(2))
    return tuple(found)


def over_gloo(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether it is Gloo that carries the device's tensors."""
    return carrier(dist.get_backend_config(group), device.type) == "gloo"


def carrier(backends: str, device: str) -> str:
    """The backend of a kind of device, from such as "cpu:gloo,cuda:nccl"."""
    return dict(pair.split(":", 1) for pair in backends.split(",") if ":" in pair).get(device, backends)


def in_16_bits(what: Method | str) -> Method | None:
    """The same method with half the bytes, or None where there is none."""
    if isinstance(what, (BlockSparse, Dense)) and what.wire_dtype == torch.float32:
        return replace(what, wire_dtype=torch.bfloat16)
    return None


def candidate(what: Method | str, gloo: bool) -> Candidate:
    """Raises TypeError or ValueError for what cannot be predicted."""
    if isinstance(what, str):
        if what == "bf16" and gloo:
            raise ValueError("advise cannot predict 'bf16' on Gloo: PyTorch's bf16 hook needs NCCL; ask about 'fp16', "
                             "or thinwire.Dense(wire_dtype=torch.bfloat16)")  # fmt: skip
        if what in _CASTS:
            return Candidate(f"PyTorch's {what} hook", what, _default_hook(_CASTS[what]))
        rank = what.removeprefix(_POWERSGD)
        if what.startswith(_POWERSGD) and rank.isdecimal() and int(rank) > 0:
            # On Gloo its hook hangs with two buckets in flight.
            return Candidate(f"PyTorch's PowerSGD, rank {rank}", what, _power_sgd(int(rank)), 3, one_bucket=gloo)
    elif isinstance(what, (BlockSparse, Dense)):
        return Candidate(label(what), what, plain().make if what.of_backend else _channel(block_sparse(what)))
    elif isinstance(what, DivideAndShuffle):
        if what.overlap != "none" or _crosses_links(what):
            raise ValueError(f"advise cannot predict {label(what)}: it knows rounds after the step, in groups on one "
                             "link; ask without overlap, global_every and hosts, and measure those")  # fmt: skip
        return Candidate(label(what), what, None)
    elif isinstance(what, LocalSteps):
        if _crosses_links(what):
            raise ValueError(f"advise cannot predict {label(what)}: it knows rounds in groups on one link; ask without "
                             "global_every and hosts, and measure those")  # fmt: skip
        make = None if what.group_size is not None else _channel(what.method.as_block_sparse())
        return Candidate(label(what), what, make)
    elif isinstance(what, Elastic):
        raise TypeError(
            f"advise cannot predict {label(what)}: what is late depends on the gradients; ask about "
            f"{label(what.method)}, and measure the two against each other"
        )
    raise TypeError(
        f"advise got {what!r} among methods: each must be a thinwire method such as thinwire.BlockSparse(), 'fp16', "
        "'bf16', or 'powersgd-1' for PowerSGD of rank 1"
    )


def label(method: Method) -> str:
    """The method as one would write it."""
    if isinstance(method, Elastic):
        default = Elastic(method.method)
    elif isinstance(method, LocalSteps):
        return _label_of_rounds(method)
    else:
        default = BlockSparse(method.selection) if isinstance(method, BlockSparse) else type(method)()
    said = []
    for name in (f.name for f in fields(method)):
        value = getattr(method, name)
        text = f"{value:.3g}" if isinstance(value, float) else repr(value)
        text = label(value) if isinstance(value, Method) else text
        if name == "selection" and value != BlockSparse().selection or name == "method":
            said.append(text)
        elif value != getattr(default, name):
            said.append(text if name == "group_size" else f"{name}={text}")
    return f"{type(method).__name__}({', '.join(said)})"


def _label_of_rounds(method):
    """Always with the steps of a round: they are what is asked about."""
    default = LocalSteps(group_size=method.group_size)
    said = [f"every={method.every!r}"]
    said += [f"group_size={method.group_size}"] if method.group_size is not None else []
    for name in (f.name for f in fields(method) if f.name != "every"):
        value = getattr(method, name)
        if value != getattr(default, name):
            said.append(f"{name}={label(value) if isinstance(value, Method) else repr(value)}")
    return f"LocalSteps({', '.join(said)})"


def _crosses_links(method):
    """Whether rounds differ in what they have to cross."""
    return method.global_every or method.schedule == "hosts" or isinstance(method.schedule, Hosts)


def ranks_in_a_group(method: DivideAndShuffle, world_size: int) -> int:
    return method.group_size or default_group_size(world_size)


# PyTorch's hooks are imported when they are needed: they need NumPy.


def _default_hook(name):
    def make(echo):
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        return lambda bucket: getattr(default_hooks, name)(echo, bucket)

    return make


def _power_sgd(rank):
    def make(echo):
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        state = powerSGD_hook.PowerSGDState(echo, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        return lambda bucket: powerSGD_hook.powerSGD_hook(state, bucket)

    return make


def _channel(sparse):
    def make(echo):
        channel = Channel(EchoLinks(echo), Reducer(sparse, echo.rank(), echo.size()), Stats())
        step, wave, waves = sparse.warmup_steps + sparse.ramp_steps, [], Waves()

        def hook(bucket):
            nonlocal step, wave, waves
            wave.append(channel.encode(bucket.buffer(), bucket.names, bucket.numels, step))
            if waves.ends(bucket.buffer().numel(), bucket.of) or bucket.is_last():
                some, wave = wave, []
                echo.beside(lambda: channel.carry(some))
            if bucket.is_last():
                step, waves = step + 1, Waves()
            return completed(bucket.buffer())

        def completed(value):
            future = torch.futures.Future()
            future.set_result(value)
            return future

        return hook

    return make


def _check_follows(method, world_size, module, optimizer, parameters):
    """Raise TypeError or ValueError where a method that follows the optimizer's steps cannot."""
    if isinstance(method, LocalSteps):
        check_local(module, optimizer, parameters)
        if method.group_size is None:
            return
        method = method.in_groups()
    if world_size > 1:
        method.partitions(world_size)
    check_optimizer(method, optimizer, parameters)


def named(given: Sequence[Method | str] | None, world_size: int, gloo: bool, module: torch.nn.Module,
          optimizer: torch.optim.Optimizer | None, names: dict[torch.Tensor, str]) -> list[Candidate]:  # fmt: skip
    """Plain DDP and what was asked for. Raises TypeError or ValueError.

    names: of the module's parameters. DivideAndShuffle and LocalSteps need an optimizer that they can follow; without,
    None is all the others.
    """
    if given is not None and (isinstance(given, (str, Method)) or not isinstance(given, Sequence)):
        raise TypeError(f"advise(methods={given!r}): methods must be a list of thinwire methods and names")
    if given is not None and not given:
        raise ValueError("advise(methods=[]): methods must hold at least one; None is those worth asking about")
    found = [plain()]
    for what in by_default(world_size, gloo) if given is None else given:
        one = candidate(what, gloo)
        try:
            if isinstance(what, (DivideAndShuffle, LocalSteps)):
                _check_follows(what, world_size, module, optimizer, [(name, p) for p, name in names.items()])
        except (TypeError, ValueError):
            if given is not None:
                raise
            continue
        found.append(one)
    return found
