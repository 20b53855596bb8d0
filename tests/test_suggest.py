"""What is warned of where a method meets its model, and where to begin the search for a learning rate."""

import pytest
import thinwire
import torch
from models import data, logged, mlp, sgd, step, wrap
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic, LocalSteps
from thinwire.state.cautions import caution_local

NOMINATED = BlockSparse("nominated", density=0.04)
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.03),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.0005),
    "AdamW without beta1": lambda p: torch.optim.AdamW(p, lr=0.0005, betas=(0.0, 0.95)),
    "SGD, damped": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, dampening=0.9),
    "SGD, nesterov": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True),
    "SGD, one group with momentum": lambda p: torch.optim.SGD(
        [{"params": p[:1]}, {"params": p[1:], "momentum": 0.9}], lr=0.03
    ),
    "AdamW, warming up": lambda p: warming_up(torch.optim.AdamW(p, lr=0.0005)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


def warming_up(optimizer):
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100))
    return optimizer


def optimizer(name):
    return OPTIMIZERS[name]([torch.nn.Parameter(torch.zeros(3)) for _ in range(2)])


@pytest.mark.parametrize(("method", "under", "lr", "own", "says"), [
    (NOMINATED, "AdamW", 0.002, 0.0, "about 25 steps"),
    (BlockSparse("nominated", density=0.16), "AdamW", 0.001, 0.0, "1 / sqrt(0.16) = 2.5"),
    (BlockSparse("nominated", density=0.01), "AdamW", 0.002, 0.0, "1 / sqrt(0.01) = 10.0: 4 times"),
    (BlockSparse("nominated", density=0.9), "AdamW", 0.0005, 0.0, "acts as momentum"),
    (NOMINATED, "SGD with momentum", 0.0949, 0.0, "0.1 times as far"),
    (NOMINATED, "SGD", 0.03, 0.0, "acts as momentum"),
    (BlockSparse("topk", density=0.01, momentum=0.9), "SGD with momentum", 0.03, 0.0, "keeps the momentum of 0.9"),
    (BlockSparse("topk", density=1.0), "AdamW", 0.0005, 0.9, "nothing is left out"),
    (BlockSparse("topk"), "AdamW", 0.001, 0.0, "about 4 steps"),
    (BlockSparse("topk", density="auto", max_inconsistency=1.0, min_density=0.04), "AdamW", 0.002, 0.0, "25 steps"),
    (BlockSparse(), "SGD with momentum", 0.03, 0.9, "unbiased"),
    (BlockSparse("nominated", density=0.04, warmup_steps=9), "AdamW", 0.002, 0.0, "the rate must be plain DDP's"),
    (BlockSparse("topk", density=0.04, momentum=0.9), "AdamW without beta1", 0.002, 0.0, "about 25 steps"),
    (NOMINATED, "SGD, damped", 0.03, 0.0, "adds up to"),
    (NOMINATED, "SGD, one group with momentum", 0.0949, 0.0, "0.1 times as far"),
    (NOMINATED, "AdamW, warming up", 0.002, 0.0, "about 25 steps"),
    (NOMINATED, "RMSprop", 0.01, 0.9, "not known"),
    (Dense(), "AdamW", 0.0005, 0.9, "as plain DDP does"),
    (DivideAndShuffle(), "SGD with momentum", 0.03, 0.9, "mean of the replicas"),
    (Elastic(NOMINATED), "AdamW", 0.002, 0.0, "about 25 steps"),
    (LocalSteps(), "AdamW", 0.0005, 0.5, "a momentum of 0.7, and beside that a low beta1"),
    (LocalSteps(), "AdamW, warming up", 0.0005, 0.5, "a low beta1"),
    (LocalSteps(), "AdamW without beta1", 0.0005, 0.0, "a low beta1"),
    (LocalSteps(outer_momentum=0), "AdamW", 0.0005, 0.9, "plain DDP's steps"),
    (LocalSteps(group_size=2), "AdamW", 0.0005, 0.9, "plain DDP's steps"),
    (LocalSteps(method=NOMINATED), "SGD with momentum", 0.03, 0.9, "plain DDP's steps"),
    (LocalSteps(), "RMSprop", 0.01, 0.9, "plain DDP's steps"),
])  # fmt: skip
def test_where_a_search_begins(method, under, lr, own, says):
    found = thinwire.suggest(method, optimizer(under), world_size=4)
    assert found.lr == pytest.approx(lr, rel=1e-3)
    assert (found.momentum if found.beta1 is None else found.beta1) == own
    group = optimizer(under).param_groups[0]
    assert found.lr == pytest.approx(found.factor * group.get("initial_lr", group["lr"]))
    assert says in str(found) and f"lr={lr:.3g}" in str(found)


def test_what_cannot_be_suggested_is_refused():
    with pytest.raises(TypeError, match="must be a thinwire method"):
        thinwire.suggest("topk", optimizer("SGD"))
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer"):
        thinwire.suggest(NOMINATED, 0.1)
    with pytest.raises(ValueError, match="pass world_size="):
        thinwire.suggest(BlockSparse("topk"), optimizer("AdamW"))


def warned(rank, n, method, under):
    model = mlp(layers=2)
    with logged() as said:
        handle = thinwire.attach(wrap(model), method, optimizer=OPTIMIZERS[under](list(model.parameters())))
    handle.close()
    return said


@pytest.mark.parametrize(("method", "under", "says"), [
    (NOMINATED, "AdamW", ("AdamW's beta1 of 0.9", "about 25 steps", "DDP's, 0.002", "thinwire.suggest")),
    (Elastic(NOMINATED), "AdamW", ("AdamW's beta1 of 0.9",)),
    (NOMINATED, "AdamW, warming up", ("4 times plain DDP's, 0.002",)),
    (NOMINATED, "SGD, nesterov", ("to 0 (and nesterov to False)",)),
    (NOMINATED, "SGD with momentum", ("SGD's momentum of 0.9", "3.2 times plain DDP's, 0.0949", "momentum=0.9) with")),
    (BlockSparse("independent", memory="error_feedback"), "AdamW", ("about 2 steps",)),
    (BlockSparse("topk"), "SGD", ("'topk'", "1 / world_size = 0.5", "density=0.04 (a share: 4 %)")),
    (BlockSparse("nominated"), "SGD", ("'nominated'", "default density")),
    (DivideAndShuffle(group_size=2), "SGD", ("groups of 2 on 2 ranks", "plain average")),
])  # fmt: skip
def test_what_is_unlikely_to_be_meant_is_warned_of_with_numbers(ranks, method, under, says):
    for said in ranks(2).run(warned, method, under):
        assert len(said) == 1 and all(word in said[0] for word in says)


@pytest.mark.parametrize(("method", "under"), [
    (NOMINATED, "AdamW without beta1"), (NOMINATED, "SGD"), (BlockSparse(), "AdamW"), (Dense(), "AdamW"),
    (BlockSparse("nominated", density=1.0), "AdamW"), (BlockSparse("topk", density=0.1, momentum=0.9), "SGD"),
    (Elastic(Dense()), "AdamW"),
])  # fmt: skip
def test_what_is_right_is_not_warned_of(ranks, method, under):
    assert ranks(2).run(warned, method, under) == [[]] * 2


def test_groups_that_differ_are_not_warned_of_and_one_rank_never_is(ranks):
    assert ranks(4).run(warned, DivideAndShuffle(group_size=2), "SGD") == [[]] * 4
    assert ranks(1).run(warned, BlockSparse("topk"), "AdamW") == [[]]


@pytest.mark.parametrize(("method", "under", "ranks", "says"), [
    (LocalSteps(), "AdamW", 4, ("AdamW's beta1 of 0.9", "outer momentum of 0.7", "at 0.5", "thinwire.suggest")),
    (LocalSteps(every=8, outer_momentum=0.5), "AdamW, warming up", 4, ("outer momentum of 0.5",)),
    (LocalSteps(), "AdamW", 1, ()),
    (LocalSteps(), "AdamW without beta1", 4, ()),
    (LocalSteps(), "SGD with momentum", 4, ()),
    (LocalSteps(outer_momentum=0), "AdamW", 4, ()),
    (LocalSteps(group_size=2), "AdamW", 4, ()),
])  # fmt: skip
def test_a_high_beta1_beside_an_outer_momentum_is_warned_of(method, under, ranks, says):
    with logged() as said:
        caution_local(method, optimizer(under), ranks)
    assert len(said) == bool(says) and all(word in said[0] for word in says)


def by_hand(rank, n):
    model = mlp(layers=2)
    ddp = wrap(model)
    ddp.register_comm_hook(thinwire.HookState(BlockSparse("topk"), model), thinwire.hook)
    with logged() as said:
        step(ddp, sgd(model), next(data(rank)))
        thinwire.DivideAndShuffleAverager(DivideAndShuffle(group_size=2))
    return ["default density" in said[0], "plain average" in said[1], len(said)]


def test_it_is_said_too_where_a_hook_is_registered_by_hand_and_by_the_averager(ranks):
    assert ranks(2).run(by_hand) == [[True, True, 2]] * 2


def test_a_density_in_per_cent_is_told_that_it_is_a_share():
    with pytest.raises(ValueError, match=r"density=4\): .*a share .*4 % is density=0.04"):
        BlockSparse("nominated", density=4)
