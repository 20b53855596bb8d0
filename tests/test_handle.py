"""One handle: every verb for every method; what close() leaves behind is plain DDP, to which attach() works again."""

import copy
import gc
import weakref

import pytest
import thinwire
import torch
import torch._dynamo
from models import data, equal_on_all_ranks, flat, logged, mlp, sgd, step, wrap
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic

METHODS = [
    Dense(),
    BlockSparse(),
    BlockSparse("nominated", density=0.1, block_size=16),
    BlockSparse("shared", density=0.3, memory="control_variate"),
    DivideAndShuffle(group_size=2),
    DivideAndShuffle(group_size=2, overlap="delayed"),
    Elastic(BlockSparse("topk", density=0.1, block_size=16), beta=0.5),
    Elastic(Dense(), beta=0.5, decide="arrival"),
]
VERBS = ("stats", "consistency", "state_dict", "finalize", "skip_step")


def name_of(method):
    return repr(method)[:60]


def start(method, model=None, optimizer=torch.optim.SGD):
    model = mlp() if model is None else model
    ddp, optimizer = wrap(model), optimizer(model.parameters(), lr=0.05)
    return model, ddp, optimizer, thinwire.attach(ddp, method, optimizer=optimizer)


def every_verb(rank, n, method):
    model, ddp, optimizer, handle = start(method)
    batches = data(rank)
    for _ in range(4):
        step(ddp, optimizer, next(batches))
    weights, state = flat(model.parameters()), handle.state_dict()
    with handle.evaluating() as module:
        same = module is model
        inside = equal_on_all_ranks(model.parameters())
    back = torch.equal(weights, flat(model.parameters()))
    found = handle.consistency()
    handle.load_state_dict(state)
    handle.skip_step()
    handle.finalize()
    step(ddp, optimizer, next(batches))
    stats = handle.stats()
    handle.finalize()
    handle.close()
    for verb in VERBS:  # none of them does anything any more, or waits for anybody
        if rank == 0 or verb == "consistency":
            getattr(handle, verb)()
    with handle.evaluating():
        pass
    return (
        isinstance(handle, thinwire.Handle), same, inside, back, equal_on_all_ranks(model.parameters()),
        {"step", "inconsistency_max", "inconsistency_mean", "gradient_norm", "bound"} <= found.keys(),
        {"steps", "bytes_sent", "dense_bytes", "compression"} <= stats.keys(),
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_every_method_has_every_verb(ranks, method):
    """evaluating() shows replicas that are equal and leaves no trace, whatever the method; so does finalize()."""
    assert ranks(4).run(every_verb, method) == [(True,) * 7] * 4


def closes(rank, n, method):
    """What a closed model computes and counts, beside a plain one that goes on from the same weights."""
    model, ddp, optimizer, handle = start(method)
    batches = data(rank)
    for _ in range(4):
        step(ddp, optimizer, next(batches))
    handle.close()
    handle.close()
    equal, sent = equal_on_all_ranks(model.parameters()), handle.stats()["bytes_sent"]
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    plain = wrap(twin)
    for _ in range(2):  # DDP makes its buckets anew after a backward pass, and sums depend on them
        plain(torch.zeros(1, 40)).sum().backward()
    optimizer, plain_optimizer = sgd(model, 0.05, 0.9), sgd(twin, 0.05, 0.9)
    for _ in range(4):
        batch = next(batches)
        step(ddp, optimizer, batch)
        step(plain, plain_optimizer, batch)
    same = torch.equal(flat(model.parameters()), flat(twin.parameters()))
    return handle.closed, equal, same, equal_on_all_ranks(model.parameters()), handle.stats()["bytes_sent"] == sent


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_after_close_the_model_is_plain_ddp(ranks, method):
    """To the bit, on 3 ranks, whose mean is not exact."""
    assert ranks(3).run(closes, method) == [(True,) * 5] * 3


def attaches_again(rank, n, first, second):
    """A model whose handle was closed, twice, against a new one with the same weights: the same bits."""
    model, ddp, optimizer, handle = start(first)
    batches = data(rank)
    for _ in range(3):
        step(ddp, optimizer, next(batches))
    handle.close()
    thinwire.attach(ddp, first, optimizer=optimizer).close()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh = mlp()
    fresh.load_state_dict(weights)
    ends = []
    for model_, ddp_ in ((model, ddp), (fresh, wrap(fresh))):
        optimizer_, batches_ = sgd(model_), data(rank, seed=1)
        handle = thinwire.attach(ddp_, second, optimizer=optimizer_)
        for _ in range(5):
            step(ddp_, optimizer_, next(batches_))
        handle.finalize()
        ends.append((flat(model_.parameters()), handle.stats()["steps"]))
        handle.close()
    return torch.equal(ends[0][0], ends[1][0]), ends[0][1] == ends[1][1] == 5


@pytest.mark.parametrize(
    ("first", "second"),
    [(METHODS[2], METHODS[1]), (METHODS[4], METHODS[2]), (METHODS[2], METHODS[4]), (METHODS[6], METHODS[2])],
    ids=lambda method: type(method).__name__,
)
def test_a_closed_model_can_be_attached_again(ranks, first, second):
    assert ranks(2).run(attaches_again, first, second) == [(True, True)] * 2


def twice(rank, n):
    model, ddp, optimizer, handle = start(METHODS[2])
    handle.close()
    thinwire.attach(ddp, METHODS[2])
    try:
        thinwire.attach(ddp, METHODS[2])
    except ValueError as error:
        return str(error)


def test_attaching_again_without_closing_is_refused(ranks):
    assert all("call close() on the handle" in said for said in ranks(2).run(twice))


def loses_nothing(rank, n):
    """close() of Elastic applies what is late: the sum of all updates is that of all gradients."""
    model = torch.nn.Linear(64, 8, bias=False)
    torch.nn.init.zeros_(model.weight)
    ddp, optimizer = wrap(model), sgd(model, lr=1.0)
    handle = thinwire.attach(ddp, Elastic(Dense(), beta=0.0), optimizer=optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        ddp(torch.ones(1, 64)).sum().backward()
        optimizer.step()
    before = model.weight[0, 0].item()
    handle.close()
    return before, model.weight[0, 0].item()


def test_closing_applies_what_is_late(ranks):
    for before, after in ranks(2).run(loses_nothing):
        assert before > -5 and after == -5


def too_soon(rank, n):
    """Between a backward pass and its step, where gradients are this rank's own."""
    model, ddp, optimizer, handle = start(DivideAndShuffle(group_size=2))
    batches = data(rank)
    step(ddp, optimizer, next(batches))
    x, y = next(batches)
    ((ddp(x) - y) ** 2).mean().backward()
    try:
        handle.close()
    except RuntimeError as error:
        said = str(error)
    optimizer.step()
    handle.close()
    step(ddp, optimizer, next(batches))
    return "between backward() and optimizer.step()" in said, equal_on_all_ranks(model.parameters())


def test_closing_while_replicas_have_gradients_of_their_own_is_refused(ranks):
    assert ranks(4).run(too_soon) == [(True, True)] * 4


def forgets(rank, n, method):
    """What a closed handle still holds, and whether it and the optimizer are freed once nobody else holds them."""
    model, ddp, optimizer, handle = start(method)
    step(ddp, optimizer, next(data(rank)))
    handle.close()
    left = sum(t.numel() for store in handle.state_dict().get("memory", {}).values() for t in store.values())
    try:
        handle.load_state_dict(handle.state_dict())
    except RuntimeError as error:
        refused = "was closed" in str(error)
    watched = weakref.ref(handle), weakref.ref(optimizer)
    del handle, optimizer
    gc.collect()
    return left, refused, [one() is None for one in watched]


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_a_closed_handle_holds_nothing_and_is_held_by_nothing(ranks, method):
    assert ranks(2).run(forgets, method) == [(0, True, [True, True])] * 2


def wrong_optimizer(rank, n):
    model = mlp(layers=2)
    ddp = wrap(model)
    try:
        thinwire.attach(ddp, METHODS[2], optimizer=object())
    except TypeError as error:
        said = str(error)
    thinwire.attach(ddp, METHODS[2], optimizer=sgd(model))  # for nothing was attached
    return said


def test_what_is_no_optimizer_is_refused_before_anything_is_attached(ranks):
    assert all("optimizer is a object" in said for said in ranks(2).run(wrong_optimizer))


def by_hand_with_wrong_module(rank, n):
    spectrum = torch.nn.Linear(4, 4, dtype=torch.complex64)
    ddp = wrap(spectrum)
    ddp.register_comm_hook(thinwire.HookState(BlockSparse(), spectrum), thinwire.hook)
    model = mlp(layers=2)
    part = wrap(model)
    part.register_comm_hook(thinwire.HookState(BlockSparse(), model[0]), thinwire.hook)
    said = []
    for one, x in ((ddp, torch.ones(1, 4, dtype=torch.complex64)), (part, torch.ones(1, 40))):
        try:
            one(x).abs().sum().backward()
        except (TypeError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_a_hook_state_checks_its_module_when_it_is_first_used(ranks):
    for said in ranks(2).run(by_hand_with_wrong_module):
        assert "averages real gradients only" in said[0] and "with the module that it wraps" in said[1]


def copied_buffers(rank, n):
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.BatchNorm1d(40))
    model, ddp, optimizer, handle = start(DivideAndShuffle(group_size=2), model)
    twin = copy.deepcopy(ddp)
    before = twin.broadcast_buffers
    thinwire.attach(twin, BlockSparse())
    return before, twin.broadcast_buffers, ddp.broadcast_buffers


def test_a_copy_gets_its_broadcast_of_buffers_back(ranks):
    assert ranks(2).run(copied_buffers) == [(False, True, False)] * 2


def stuck(rank, n):
    """finalize() cannot succeed: close() raises, and has closed."""
    model, ddp, _, handle = start(DivideAndShuffle(group_size=2, overlap="delayed"), optimizer=torch.optim.AdamW)
    state_of = {name: torch.zeros(p.numel()) for name, p in model.named_parameters()}
    handle._pending = {"exp_avg": state_of}
    try:
        handle.close()
    except RuntimeError as error:
        said = str(error)
    thinwire.attach(ddp, BlockSparse())
    return "load its state_dict too" in said, handle.closed


def test_close_ends_what_cannot_be_finalized(ranks):
    assert ranks(2).run(stuck) == [(True, True)] * 2


def python_reducer(rank, n):
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        ddp = wrap(mlp(layers=2))
        try:
            thinwire.attach(ddp, BlockSparse())
        except ValueError as error:
            return str(error)


def test_ddps_python_reducer_is_refused(ranks):
    assert all("python_reducer" in said and "optimize_ddp" in said for said in ranks(2).run(python_reducer))


def test_a_hook_state_takes_the_module_not_its_wrapper(ranks):
    assert all("pass the model that it wraps" in said for said in ranks(2).run(wrapped_state))


def wrapped_state(rank, n):
    try:
        thinwire.HookState(BlockSparse(), wrap(mlp(layers=2)))
    except TypeError as error:
        return str(error)


def copies(rank, n, method):
    model, ddp, optimizer, handle = start(method)
    step(ddp, optimizer, next(data(rank)))
    with logged() as said:
        twin = copy.deepcopy(ddp)
    again = thinwire.attach(twin, BlockSparse(), optimizer=sgd(twin))
    step(twin, sgd(twin), next(data(rank)))
    return ["was copied" in line for line in said], again.stats()["steps"], handle.stats()["steps"]


@pytest.mark.parametrize("method", METHODS[2:7:2], ids=name_of)
def test_a_copied_model_says_that_its_hook_is_dead_and_can_be_attached(ranks, method):
    assert ranks(2).run(copies, method) == [([True], 1, 1)] * 2
