"""A run that is stopped and resumed is the run that never stopped; and bad states change nothing."""

import io

import pytest
import thinwire
import torch
from models import ALL_METHODS, attach, data, flat, label, logged, mlp, sgd, step, wrap
from thinwire import BlockSparse

TOPK = BlockSparse("topk", density=0.1, block_size=16)


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def plain(value):
    """Whether a state holds nothing but tensors, numbers and strings."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and plain(v) for k, v in value.items())
    return isinstance(value, (torch.Tensor, int, float, str))


def resume(rank, n, methods, caps, first=6, second=6):
    outcomes = []
    for method in methods:
        model = mlp()
        ddp = wrap(model)
        optimizer, batches = sgd(ddp), data(rank)
        handle = attach(ddp, method, optimizer)
        for _ in range(first):
            step(ddp, optimizer, next(batches))
        state = handle.state_dict()
        ok = plain(state)
        state, weights = through_a_file(state), {k: v.clone() for k, v in model.state_dict().items()}
        rest = [next(batches) for _ in range(second)]
        for batch in rest:
            step(ddp, optimizer, batch)
        for cap in caps:
            again = mlp(seed=9)
            again.load_state_dict(weights)
            ddp2 = wrap(again, bucket_cap_mb=cap)
            optimizer2 = sgd(ddp2)
            handle2 = attach(ddp2, method, optimizer2)
            handle2.load_state_dict(state)
            for batch in rest:
                step(ddp2, optimizer2, batch)
            same = torch.equal(flat(model.parameters()), flat(again.parameters()))
            a, b = handle.state_dict()["memory"], handle2.state_dict()["memory"]
            same &= all(torch.equal(a[kind][name], b[kind][name]) for kind in a for name in a[kind])
            ok &= same
        outcomes.append(ok)
    return outcomes


@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.full), 3])
def test_resumed_is_uninterrupted_whatever_the_buckets(ranks, n):
    """The fresh DDP starts with other buckets than the rebuilt ones, and here with other sizes too."""
    for of_rank in ranks(n).run(resume, ALL_METHODS, (0.01, 0.03, 25), seconds=900):
        assert [label(m) for m, ok in zip(ALL_METHODS, of_rank, strict=True) if not ok] == []


def resume_by_hand(rank, n):
    """load_state_dict on a HookState that knows no process group yet, as where a trainer builds DDP later."""
    model = mlp()
    ddp = wrap(model)
    optimizer, batches = sgd(ddp), data(rank)
    handle = attach(ddp, TOPK)
    for _ in range(4):
        step(ddp, optimizer, next(batches))
    state, weights = handle.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    batch = next(batches)
    step(ddp, optimizer, batch)
    again = mlp()
    again.load_state_dict(weights)
    ddp2 = wrap(again)
    late = thinwire.HookState(TOPK, again)
    late.load_state_dict(state)
    ddp2.register_comm_hook(late, thinwire.hook)
    step(ddp2, sgd(ddp2), batch)
    return torch.equal(flat(model.parameters()), flat(again.parameters()))


def test_state_loaded_before_the_model_is_known(ranks):
    assert ranks(2).run(resume_by_hand) == [True, True]


def save_shards(rank, n, method):
    model = mlp()
    ddp = wrap(model)
    optimizer, batches = sgd(ddp), data(rank)
    handle = attach(ddp, method, optimizer)
    for _ in range(3):
        step(ddp, optimizer, next(batches))
    return handle.state_dict()


def load_shards(rank, n, method, shards):
    ddp = wrap(mlp())
    handle = attach(ddp, method, sgd(ddp))
    with logged() as messages:
        handle.load_state_dict(shards)
    x, y = next(data(rank))
    ((ddp(x) - y) ** 2).mean().backward()  # and it runs
    another = wrap(mlp())
    fresh = attach(another, method, sgd(another))
    fresh.load_state_dict(shards)
    return fresh.state_dict(), messages


def mean_of(states, kind):
    return {k: sum(s["memory"][kind][k].double() for s in states if k in s["memory"][kind]) / len(states)
            for k in states[0]["memory"][kind]}  # fmt: skip


@pytest.mark.parametrize(
    "method", [TOPK, BlockSparse("topk", density=0.1, momentum=0.9), BlockSparse(memory="control_variate")], ids=repr
)
@pytest.mark.parametrize("now", [2, 4])
def test_at_another_number_of_ranks_no_mass_is_lost(ranks, now, method):
    shards = ranks(3).run(save_shards, method)
    loaded = ranks(now).run(load_shards, method, shards)
    for kind in shards[0]["memory"]:
        before, after = mean_of(shards, kind), mean_of([state for state, _ in loaded], kind)
        assert before.keys() == after.keys() and len(before) > 5
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-7)
    assert all(state["step"] == 3 for state, _ in loaded)
    assert all(any("3 ranks loaded on" in m for m in messages) for _, messages in loaded)


def refused(rank, n, shards):
    """Each bad state must raise and leave the handle as it was."""
    ddp = wrap(mlp())
    handle = attach(ddp, TOPK)
    optimizer, batches = sgd(ddp), data(rank)
    for _ in range(2):
        step(ddp, optimizer, next(batches))
    good = handle.state_dict()
    other_shape = handle.state_dict()
    other_shape["memory"]["residual"]["0.weight"] = torch.zeros(3)
    unknown = handle.state_dict()
    unknown["memory"]["residual"]["nowhere"] = torch.zeros(3)
    other_method = handle.state_dict()
    other_method["method"]["memory"] = "control_variate"
    messages = []
    no_step = {key: value for key, value in handle.state_dict().items() if key != "step"}
    other_step = [shards[0], shards[1], shards[2] | {"step": 9}]
    strange = ({"weights": 1}, None, [], no_step, other_step)
    for bad in (shards[0], shards[:2], other_shape, unknown, other_method, *strange):
        try:
            handle.load_state_dict(bad)
            messages.append("accepted")
        except (ValueError, TypeError) as error:
            messages.append(str(error))
    after = handle.state_dict()
    same = all(torch.equal(good["memory"]["residual"][k], after["memory"]["residual"][k])
               for k in good["memory"]["residual"])  # fmt: skip
    return messages, same and good["step"] == after["step"]


def test_bad_states_are_refused_and_change_nothing(ranks):
    shards = ranks(3).run(save_shards, TOPK)
    for messages, same in ranks(2).run(refused, shards):
        says = ["a list of the shards of all ranks", "a list of the shards of all ranks", "'0.weight' has 3 elements",
                "no such parameter", "memory=control_variate", "not a thinwire state", "NoneType", "empty list",
                "not a thinwire state", "different step"]  # fmt: skip
        for message, expected in zip(messages, says, strict=True):
            assert expected in message
        assert same
