"""thinwire.estimate of local steps: a step's share of a round, against what its parts send and against formulas."""

import dataclasses

import pytest
import thinwire
import torch
from models import data, mlp, sgd, step, wrap
from thinwire import BlockSparse, Dense, LocalSteps

INT4 = Dense(wire_dtype="int4", memory="error_feedback")


def with_norm():
    """Parameters, and 2 * 24 float elements of buffers beside an integer one."""
    return torch.nn.Sequential(torch.nn.Linear(10, 24), torch.nn.BatchNorm1d(24))


def sent(method, model, ranks, step=None):
    return thinwire.estimate(method, model, ranks, step)["bytes_sent"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("inner", [
    None, Dense(exact=True), Dense(torch.bfloat16), BlockSparse("nominated", density=0.1, wire_dtype="int4"),
    BlockSparse("topk", density=0.1), BlockSparse("shared", density=0.3), BlockSparse(),
    BlockSparse("nominated", density=0.1, memory="weights", wire_dtype="int4"),
], ids=str)  # fmt: skip
def test_a_step_is_its_share_of_a_round_of_the_inner_method(inner, ranks):
    for every in (1, 16):
        method = LocalSteps(every=every, method=inner)
        alike = inner or INT4
        if alike.memory == "weights":  # the same blocks, and what is not sent waits elsewhere
            alike = dataclasses.replace(alike, memory="error_feedback")
        assert sent(method, mlp(), ranks) == pytest.approx(sent(alike, mlp(), ranks) / every)


def test_fragments_send_as_much_in_as_many_steps():
    assert sent(LocalSteps(every=12, fragments=3), mlp(), 4) == sent(LocalSteps(every=12), mlp(), 4)
    assert sent(LocalSteps(every=13, fragments=3), mlp(), 4) == sent(LocalSteps(every=12), mlp(), 4), "4 steps apart"


def test_compression_is_against_a_step_of_plain_ddp():
    model = mlp()
    found = thinwire.estimate(LocalSteps(every=16), model, 4)
    assert found["dense_bytes"] == thinwire.estimate(Dense(), model, 4)["dense_bytes"]
    assert found["compression"] == pytest.approx(found["dense_bytes"] / found["bytes_sent"])
    # 4 bits for 32, and the scales of blocks of 16: less than 8 times fewer in a round, and 16 steps of them.
    assert 16 * 6 < found["compression"] < 16 * 8
    assert thinwire.estimate(LocalSteps(every=32), model, 4)["compression"] == pytest.approx(2 * found["compression"])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_float_buffers_travel_in_float32_beside_the_parameters(ranks):
    model = with_norm()
    there_and_back = 2 * 4 * 2 * (ranks - 1) * -(-24 // ranks)
    averaged, left = (LocalSteps(every=8, average_buffers=average) for average in (True, False))
    assert sent(averaged, model, ranks) - sent(left, model, ranks) == pytest.approx(there_and_back / 8)
    assert sent(left, model, ranks) == pytest.approx(sent(INT4, model, ranks) / 8)


def test_of_16_bit_parameters_differences_travel_in_32():
    method = LocalSteps(every=4, method=Dense())
    assert sent(method, with_norm().to(torch.bfloat16), 4) == sent(method, with_norm(), 4)
    assert sent(LocalSteps(every=4), with_norm().to(torch.bfloat16), 4) == sent(LocalSteps(every=4), with_norm(), 4)


@pytest.mark.parametrize(("groups", "ranks_in_a_round"), [
    ({"group_size": 2}, [2]), ({"group_size": 4}, [4]), ({"group_size": 2, "global_every": 4}, [2, 2, 2, 8]),
    ({"group_size": 3, "schedule": "ring"}, [3]), ({"group_size": 16}, [8]),
], ids=str)  # fmt: skip
def test_in_groups_parameters_travel_as_they_are(groups, ranks_in_a_round):
    numel = sum(p.numel() for p in with_norm().parameters())
    of_one = lambda elements: sum(2 * (s - 1) / s * 4 * elements for s in ranks_in_a_round) / len(ranks_in_a_round)
    assert sent(LocalSteps(every=4, **groups), with_norm(), 8) == pytest.approx(of_one(numel + 48) / 4)
    alone = LocalSteps(every=4, average_buffers=False, **groups)
    assert sent(alone, with_norm(), 8) == pytest.approx(of_one(numel) / 4)


def test_steps_of_the_warm_up_are_dense_and_those_after_it_count_rounds_of_the_method():
    model = mlp()
    inner = BlockSparse("topk", density=0.1, block_size=16, warmup_steps=1, ramp_steps=2)
    method = LocalSteps(every=4, method=inner, warmup_steps=10, average_buffers=False)
    dense = thinwire.estimate(Dense(), model, 3)
    for first in (0, 9):
        assert thinwire.estimate(method, model, 3, first) == dense
    for later, number in ((10, 0), (13, 0), (14, 1), (19, 2), (10 + 4 * 3, 3), (1000, None), (None, None)):
        assert sent(method, model, 3, later) == pytest.approx(sent(inner, model, 3, number) / 4), later


def test_what_follows_the_link_has_no_estimate():
    with pytest.raises(ValueError, match=r"every='auto'.*give every as a number, or ask thinwire\.advise"):
        thinwire.estimate(LocalSteps(every="auto"), mlp(), 4)
    assert sent(LocalSteps(every=8, overlap="auto"), mlp(), 4) == sent(LocalSteps(every=8), mlp(), 4)


SENT = [
    LocalSteps(every=4), LocalSteps(every=3, method=Dense(), overlap=0), LocalSteps(every=2, average_buffers=False),
    LocalSteps(every=4, method=Dense(torch.bfloat16), warmup_steps=4), LocalSteps(every=6, fragments=3, overlap=2),
    LocalSteps(every=4, method=BlockSparse("topk", density=0.1, block_size=16)),
    LocalSteps(every=4, group_size=2, overlap=0),
]  # fmt: skip


def trained(rank, n, dtype):
    """Bytes of twelve steps as counted, and as estimated."""
    rows = []
    for method in SENT:
        layers = torch.nn.Linear(40, 24), torch.nn.BatchNorm1d(24), torch.nn.Linear(24, 40)
        model = torch.nn.Sequential(*layers).to(dtype)
        ddp = wrap(model)
        optimizer, batches = sgd(model), data(rank, dtype=dtype)
        handle = thinwire.attach(ddp, method, optimizer=optimizer)
        for _ in range(12):
            step(ddp, optimizer, next(batches))
        handle.state_dict()  # waits for what is under way
        counted = handle.stats()["bytes_sent"]
        handle.close()
        rows.append((counted, sum(sent(method, model, n, number) for number in range(12))))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_estimated_is_what_is_sent(ranks, dtype):
    for rows in ranks(4).run(trained, dtype):
        for method, (counted, estimated) in zip(SENT, rows, strict=True):
            assert counted == pytest.approx(estimated, abs=12), method
