"""What cannot work is refused with what to do about it; what differs between ranks is an error on all, not a hang."""

import time

import pytest
import thinwire
import torch
from models import attach, data, logged, mlp, sgd, step, wrap
from thinwire import BlockSparse, Dense

TOPK = BlockSparse("topk", density=0.1)


def message(function):
    try:
        function()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def first_step(ddp):
    x, y = next(data(0))
    ((ddp(x) - y) ** 2).mean().backward()


def differing(rank, n, methods, seeds=(0, 0, 0), at_step=(0, 0, 0)):
    ddp = wrap(mlp(layers=5))
    handle = attach(ddp, methods[rank], sgd(ddp))
    handle._step = at_step[rank]
    begin = time.monotonic()
    said = message(lambda: first_step(ddp))
    return said, time.monotonic() - begin


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ((TOPK, TOPK, BlockSparse("shared")), "selection: topk on rank 0,1, shared on rank 2"),
        ((BlockSparse(), BlockSparse(seed=1), BlockSparse()), "seed: 0 on rank 0,2, 1 on rank 1"),
        ((BlockSparse(), Dense(), BlockSparse()), "method: BlockSparse on rank 0,2, Dense on rank 1"),
        ((TOPK, TOPK, BlockSparse("topk", density=0.2)), "density: 0.1 on rank 0,1, 0.2 on rank 2"),
    ],
)
def test_different_methods(ranks, methods, says):
    for said, seconds in ranks(3).run(differing, methods):
        assert said.startswith("ValueError: thinwire: the ranks differ in") and says in said
        assert seconds < 60


def test_only_some_ranks_resumed(ranks):
    for said, _ in ranks(3).run(differing, (TOPK,) * 3, (0, 0, 0), (7, 7, 0)):
        assert "step: 7 on rank 0,1, 0 on rank 2" in said


def other_names(rank, n):
    """DDP itself compares shapes, so the models differ in what their parameters are called."""
    model = torch.nn.ModuleDict({"ab"[rank]: torch.nn.Linear(40, 40)})
    model.forward = lambda x: model["ab"[rank]](x)
    ddp = wrap(model)
    attach(ddp, TOPK)
    return message(lambda: first_step(ddp))


def test_different_models(ranks):
    assert all("the ranks differ in model" in said for said in ranks(2).run(other_names))


def refusals(rank, n):
    model = mlp(layers=2)
    ddp = wrap(model)
    momentum = BlockSparse("topk", density=0.1, momentum=0.9)
    sparse = wrap(torch.nn.Sequential(torch.nn.Embedding(10, 4, sparse=True)))
    complex_ = wrap(torch.nn.Linear(4, 4, dtype=torch.complex64))
    said = {
        "not ddp": message(lambda: thinwire.attach(model, TOPK)),
        "not a method": message(lambda: thinwire.attach(ddp, "topk")),
        "momentum twice": message(lambda: thinwire.attach(ddp, momentum, optimizer=sgd(ddp, momentum=0.9))),
        "adam too": message(lambda: thinwire.attach(ddp, momentum, optimizer=torch.optim.Adam(ddp.parameters()))),
        "no optimizer": message(lambda: thinwire.attach(ddp, momentum)),
        "sparse": message(lambda: thinwire.attach(sparse, TOPK)),
        "complex": message(lambda: thinwire.attach(complex_, TOPK)),
        "state too early": message(lambda: thinwire.HookState(TOPK, model).state_dict()),
    }
    thinwire.attach(ddp, momentum, optimizer=torch.optim.Adam(ddp.parameters(), betas=(0.0, 0.95)))
    said["second hook"] = message(lambda: thinwire.attach(ddp, TOPK))
    step(ddp, sgd(ddp), next(data(rank)))  # and the first one still works
    return said


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("not ddp", "TypeError: attach got a Sequential: it must be a DistributedDataParallel"),
        ("not a method", "TypeError: method is 'topk'"),
        ("momentum twice", "SGD's parameter group 0 has 0.9 of its own"),
        ("adam too", "Adam's parameter group 0 has 0.9 of its own"),
        ("no optimizer", "pass optimizer="),
        ("sparse", "TypeError: module '0' has sparse gradients; make it with sparse=False"),
        ("complex", "TypeError: parameter 'weight' is torch.complex64"),
        ("second hook", "already has a communication hook (thinwire's)"),
        ("state too early", "has no model yet"),
    ],
)
def test_refused(ranks, case, says):
    assert all(says in said[case] for said in ranks(2).run(refusals))


def momentum_of_its_own(rank, n):
    model = mlp(layers=5)
    with logged() as said:
        attach(wrap(model), BlockSparse("nominated", density=0.1), sgd(model, momentum=0.9))
    return said


def test_an_optimizers_momentum_beside_error_feedback_is_mentioned(ranks):
    for said in ranks(2).run(momentum_of_its_own):
        assert len(said) == 1 and "BlockSparse(..., momentum=0.9)" in said[0]


def loaded_too_early(rank, n):
    return message(lambda: thinwire.HookState(TOPK, mlp()).load_state_dict({"a": 1}))


def test_a_wrong_state_is_refused_before_there_is_a_model(ranks):
    assert all("not a thinwire state" in said for said in ranks(2).run(loaded_too_early))


def test_a_near_miss_is_named():
    with pytest.raises(ValueError, match="did you mean 'topk'"):
        BlockSparse("top-k")
