"""Wrong arguments are refused on every rank with nothing changed; a GradScaler stays one that can be copied."""

import ast
import copy
import io
import math
import pathlib
import pickle

import pytest
import thinwire
import torch
import torch.distributed as dist
from models import ALL_METHODS, data, flat, mlp, sgd, step, wrap
from simulated_horovod import World, hvd
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic

METHODS = [Dense(), BlockSparse("topk", density=0.1), DivideAndShuffle(), Elastic(Dense(), beta=0.5)]
SHUFFLE = DivideAndShuffle(group_size=2)


def raised(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def model_with_buffers():
    return torch.nn.Sequential(mlp(layers=3), torch.nn.BatchNorm1d(40))


# ---- optimizers and GradScalers ----


def of_wrong_type(rank, n, option, wrong, on):
    """What is said where some ranks are given something else, and whether the model still takes the right ones."""
    said = []
    for method in METHODS:
        model = mlp(layers=3)
        ddp, optimizer = wrap(model), sgd(model)
        collective = isinstance(method, (DivideAndShuffle, Elastic))
        given = {"optimizer": optimizer} | ({option: wrong} if rank in on or not collective else {})
        said.append(raised(lambda: thinwire.attach(ddp, method, **given)))  # noqa: B023
        thinwire.attach(ddp, method, optimizer=optimizer)
        step(ddp, optimizer, next(data(rank)))
    return said


@pytest.mark.parametrize("on", [(0,), (0, 1)], ids=str)
@pytest.mark.parametrize(
    ("option", "wrong", "says"),
    [
        ("optimizer", "sgd", "optimizer is a str"),
        ("optimizer", [], "optimizer is a list"),
        ("grad_scaler", True, "grad_scaler is a bool"),
        ("grad_scaler", 1024.0, "grad_scaler is a float"),
        ("grad_scaler", torch.amp.GradScaler, "grad_scaler is the class GradScaler"),
    ],
)
def test_an_optimizer_or_scaler_of_a_wrong_type_is_a_type_error_on_every_rank(ranks, option, wrong, says, on):
    for said in ranks(2).run(of_wrong_type, option, wrong, on):
        assert all(one.startswith(f"TypeError: {says}") for one in said), said


@pytest.mark.skipif(hvd is None, reason="Horovod is not installed: 'make horovod' builds it")
def test_so_it_is_with_horovod(one_thread):
    def refused():
        model = mlp(layers=3)
        for method in (BlockSparse(), BlockSparse("nominated", density=0.1, momentum=0.5), Elastic(Dense())):
            for option, wrong in (("optimizer", "sgd"), ("grad_scaler", 1024.0)):
                given = {"optimizer": sgd(model)} | {option: wrong}
                said = raised(lambda: thinwire.horovod.Compressor(model.named_parameters(), method, **given))  # noqa: B023
                assert said.startswith(f"TypeError: {option} is a {type(wrong).__name__}"), said

    errors = World(1).run(refused)
    assert not any(errors), "\n".join(errors)


# ---- an attach that fails ----


def traces(ddp, optimizer, scaler):
    """All that attach may change of what it is given."""
    return (
        ddp.broadcast_buffers, list(ddp._comm_hooks), len(optimizer._optimizer_step_pre_hooks),
        len(optimizer._optimizer_step_post_hooks), dict(scaler.__dict__),
    )  # fmt: skip


class Rigid(torch.amp.GradScaler):
    """One whose methods cannot be replaced."""

    def __setattr__(self, name, value):
        if name in ("step", "__getstate__"):
            raise AttributeError(f"{name} is fixed")
        super().__setattr__(name, value)


def fails(rank, n, method, why):
    """A builtin hook is there, of which DDP's Python side knows nothing; or only some of the job's ranks are in it."""
    model = model_with_buffers()
    group = dist.new_group([0, 1]) if why == "part of the job" else None
    if group is not None and rank > 1:
        return "", True, True
    ddp = wrap(model, process_group=group)
    optimizer = sgd(model)
    scaler = (Rigid if why == "a rigid scaler" else torch.amp.GradScaler)("cpu", init_scale=2.0)
    if why == "a builtin hook":
        dist._register_builtin_comm_hook(ddp.reducer, dist.BuiltinCommHookType.ALLREDUCE)
    before = traces(ddp, optimizer, scaler)
    said = raised(lambda: thinwire.attach(ddp, method, optimizer=optimizer, grad_scaler=scaler))
    same = before == traces(ddp, optimizer, scaler)
    if why == "a rigid scaler":
        thinwire.attach(ddp, method, optimizer=optimizer)
    for batch, _ in zip(data(rank), range(2)):
        step(ddp, optimizer, batch)
    return said, same, bool(flat(model.parameters()).isfinite().all())


@pytest.mark.parametrize(
    ("method", "why", "says"),
    [(method, "a builtin hook", "can only be called once") for method in METHODS]
    + [(SHUFFLE, "part of the job", "of 2 of 3 ranks"), (SHUFFLE, "a rigid scaler", "step is fixed")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_failed_attach_leaves_nothing_behind(ranks, method, why, says):
    results = ranks(3).run(fails, method, why)
    assert says in results[0][0]
    assert all(same and trains for _, same, trains in results)


# ---- numbers ----


@pytest.mark.parametrize(("value", "kind"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError),
                                             (True, TypeError), (math.nan, TypeError)])  # fmt: skip
def test_a_number_of_ranks_that_is_none_is_refused(value, kind):
    for method in (BlockSparse(), Dense(), Elastic(Dense())):
        with pytest.raises(kind, match=r"estimate\(world_size=.*an integer of at least 1"):
            thinwire.estimate(method, mlp(), value)
        with pytest.raises(kind, match=r"suggest\(world_size="):
            thinwire.suggest(method, sgd(mlp()), value)
    with pytest.raises(kind, match=r"DivideAndShuffle.partitions\(world_size="):
        DivideAndShuffle().partitions(value)
    if value != 0:
        with pytest.raises(kind, match=r"estimate\(step="):
            thinwire.estimate(BlockSparse(), mlp(), 2, value)


def test_an_estimate_is_of_a_module():
    with pytest.raises(TypeError, match="estimate got a list as model"):
        thinwire.estimate(BlockSparse(), [], 2)


# ---- a GradScaler that was given away ----


def through_a_file(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler)), through_a_file]


def scaled(ddp, optimizer, scaler, batch):
    x, y = batch
    optimizer.zero_grad()
    scaler.scale(((ddp(x) - y) ** 2).mean()).backward()
    scaler.step(optimizer)
    scaler.update()


def copied(rank, n, first_to_close):
    """One scaler of two models: its copies are plain ones, and in the end so is it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    plain, batches, running = set(scaler.__dict__), data(rank), []
    for _ in range(2):
        model = mlp(layers=3)
        ddp, optimizer = wrap(model), sgd(model)
        running.append((ddp, optimizer, thinwire.attach(ddp, SHUFFLE, optimizer=optimizer, grad_scaler=scaler)))
        scaled(ddp, optimizer, scaler, next(batches))
    found = []
    for make in COPIES:
        one = make(scaler)
        found += [type(one) is type(scaler), set(one.__dict__) == plain, one.state_dict() == scaler.state_dict()]
        rounds = running[0][2].stats()["steps"]
        other = mlp(layers=3)
        scaled(other, sgd(other), one, next(batches))
        found.append(running[0][2].stats()["steps"] == rounds)
    found.append(b"thinwire" not in pickle.dumps(scaler))
    ddp, optimizer, handle = running[0]
    rounds = handle.stats()["steps"]
    scaled(ddp, optimizer, scaler, next(batches))
    found.append(handle.stats()["steps"] == rounds + 1)
    for i in (first_to_close, 1 - first_to_close):
        running[i][2].close()
    found.append(set(pickle.loads(pickle.dumps(scaler)).__dict__) == plain)
    return found, set(scaler.__dict__) == plain


@pytest.mark.parametrize("first_to_close", [0, 1])
def test_a_scaler_can_be_copied_and_the_copy_is_a_plain_one(ranks, first_to_close):
    for found, back in ranks(2).run(copied, first_to_close):
        assert all(found)
        assert back or first_to_close == 0  # what was wrapped around since stays, and only passes on


# ---- a default device ----


EVERY = [*ALL_METHODS, Dense(), BlockSparse("topk", density="auto", max_inconsistency=1.0),
         Elastic(BlockSparse("nominated", density=0.1, block_size=16), beta=0.5),
         Elastic(Dense(), beta=0.5, speculate=True), SHUFFLE,
         DivideAndShuffle(group_size=2, overlap="bucket"),
         DivideAndShuffle(group_size=2, overlap="delayed"),
         DivideAndShuffle(group_size=2, blocks=BlockSparse("shared", density=0.3))]  # fmt: skip


def under_a_default_device(rank, n):
    """Training and every verb where whatever is made without a device cannot be read; against the same without."""
    differ = []
    for method in EVERY:
        ends = []
        for device in (None, "meta"):
            model = mlp(layers=3)
            ddp, optimizer = wrap(model), sgd(model)
            batches = [batch for _, batch in zip(range(4), data(rank))]
            torch.set_default_device(device)
            try:
                handle = thinwire.attach(ddp, method, optimizer=optimizer, consistency_every=2)
                for batch in batches[:3]:
                    step(ddp, optimizer, batch)
                state = handle.state_dict()
                with handle.evaluating():
                    pass
                found = handle.consistency()
                handle.load_state_dict(state)
                handle.skip_step()
                handle.finalize()
                handle.stats()
                step(ddp, optimizer, batches[3])
                if not isinstance(method, Elastic):  # of which it is finalize() again, and the end of its threads
                    handle.close()
                thinwire.suggest(method, optimizer)
                sent = None if isinstance(method, DivideAndShuffle) else thinwire.estimate(method, model, n)
            finally:
                torch.set_default_device(None)
            ends.append((flat(model.parameters()).tolist(), found["inconsistency_max"], found["gradient_norm"], sent))
        if ends[0] != ends[1]:
            differ.append(repr(method))
    return differ


def test_the_default_device_changes_nothing(ranks):
    assert ranks(2).run(under_a_default_device) == [[]] * 2


MAKES = {"arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand",
         "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"}  # fmt: skip


def test_what_makes_a_tensor_says_where():
    """Horovod's side and the workers of hogwild too."""
    package = pathlib.Path(thinwire.__file__).parent
    without = []
    for file in package.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            made = isinstance(call, ast.Call) and ast.unparse(call.func).removeprefix("torch.") in MAKES
            if made and not any(keyword.arg == "device" for keyword in call.keywords):
                without.append(f"{file.relative_to(package)}:{call.lineno}: {ast.unparse(call)}")
    assert without == []
