"""Divide-and-Shuffle on DDP: replicas step alone and are averaged in groups that change."""

import contextlib
import copy
import gc
import itertools
import math
import time
import weakref

import pytest
import thinwire
import torch
import torch.distributed as dist
from models import data, equal_on_all_ranks, flat, logged, mlp, sgd, step, wrap
from thinwire import BlockSparse, DivideAndShuffle, DivideAndShuffleAverager
from thinwire.methods import schedules
from thinwire.replicas import means
from thinwire.replicas.handle import Replicas
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.optim import PostLocalSGDOptimizer

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3),
}


def with_batchnorm(seed=0):
    model = mlp(layers=5, seed=seed)
    return torch.nn.Sequential(model[:4], torch.nn.BatchNorm1d(40), model[4:])


def start(method, optimizer="sgd", build=mlp, ddp_options=None, **options):
    model = build()
    ddp = wrap(model, **(ddp_options or {}))
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    return model, ddp, optimizer, thinwire.attach(ddp, method, optimizer=optimizer, **options)


def state_of(model, optimizer):
    """All that a replica is, flat."""
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    return flat(tensors + [t for p in model.parameters() for t in optimizer.state[p].values() if torch.is_tensor(t)])


def of_every_rank(tensor):
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, tensor.contiguous())
    return torch.stack(everyone)


@contextlib.contextmanager
def small_pieces():
    """Pieces of one or two tensors, as a large model has many; yields how often a step was made in pieces."""
    made, whole = [], means.PIECE_BYTES
    method = Replicas.pieces_to_step

    def counted(self):
        made.append(0)
        for piece in method(self):
            made[-1] += 1
            yield piece

    means.PIECE_BYTES, Replicas.pieces_to_step = 8000, counted
    try:
        yield made
    finally:
        means.PIECE_BYTES, Replicas.pieces_to_step = whole, method


# ---- what a round does ----


def by_hand(rank, n, overlap):
    """Attached, against the same steps and averages written out with an all-gather."""
    with small_pieces() as made:
        return _by_hand(rank, n, overlap), made


def _by_hand(rank, n, overlap):
    model, ddp, optimizer, handle = start(DivideAndShuffle(overlap=overlap))
    other = mlp()
    other_optimizer = OPTIMIZERS["sgd"](other.parameters())
    batches, others_batches, partitions = data(rank), data(rank), handle.method.partitions(n)
    correction = None
    for t in range(6):
        step(ddp, optimizer, next(batches))
        step(other, other_optimizer, next(others_batches))
        members = next(group for group in partitions[t % len(partitions)] if rank in group)
        with torch.no_grad():
            parameters = torch.nn.utils.parameters_to_vector(other.parameters())
            if correction is not None:
                parameters = parameters + correction
            mean = of_every_rank(parameters)[list(members)].mean(0)
            correction = mean - parameters if overlap == "delayed" else None
            now = parameters if overlap == "delayed" else mean
            torch.nn.utils.vector_to_parameters(now, other.parameters())
    return float((flat(model.parameters()) - flat(other.parameters())).abs().max())


@pytest.mark.parametrize("overlap", ["none", "bucket", "delayed"])
def test_rounds_are_what_they_say(ranks, overlap):
    for gap, made in ranks(4).run(by_hand, overlap):
        assert gap < 1e-6
        assert len(made) == (6 if overlap == "bucket" else 0) and all(pieces > 4 for pieces in made)


def overlapped(rank, n, optimizer):
    results = []
    for overlap in ("none", "bucket"):
        with small_pieces() as made:
            model, ddp, opt, _ = start(DivideAndShuffle(overlap=overlap, schedule="ring"), optimizer, with_batchnorm)
            scheduler = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)  # wraps the optimizer's step
            batches = data(rank)
            for _ in range(40):
                step(ddp, opt, next(batches))
                scheduler.step()
            results.append(state_of(model, opt))
    whole = sum(map(len, (group["params"] for group in opt.param_groups))) == len(list(model.parameters()))
    return torch.equal(*results) and len(made) == 40 and whole


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bucket_overlap_has_the_same_bits(ranks, optimizer):
    assert all(ranks(3).run(overlapped, optimizer))


def global_rounds(rank, n, method, lr=0.05):
    model = mlp()
    ddp = wrap(model)
    optimizer = sgd(ddp, lr, momentum=0.9)
    handle = thinwire.attach(ddp, method, optimizer=optimizer)
    plain = mlp()
    plain_ddp = wrap(plain)
    plain_optimizer = sgd(plain_ddp, lr, momentum=0.9)
    batches, plain_batches = data(rank), data(rank)
    for _ in range(10):
        step(ddp, optimizer, next(batches))
        step(plain_ddp, plain_optimizer, next(plain_batches))
    gap = float((flat(model.parameters()) - flat(plain.parameters())).abs().max())
    return gap, handle.consistency()["consensus_distance"], equal_on_all_ranks(list(model.parameters()))


@pytest.mark.parametrize("method", [DivideAndShuffle(group_size=4), DivideAndShuffle(global_every=1)])
def test_with_groups_of_all_it_is_plain_ddp(ranks, method):
    for gap, distance, equal in ranks(4).run(global_rounds, method):
        assert gap < 1e-6 and distance < 1e-12 and equal


def alone(rank, n):
    model, ddp, optimizer, handle = start(DivideAndShuffle())
    plain = mlp()
    plain_optimizer = OPTIMIZERS["sgd"](plain.parameters())
    for batch, _ in zip(data(rank), range(5)):
        step(ddp, optimizer, batch)
        step(plain, plain_optimizer, batch)
    return torch.equal(flat(model.parameters()), flat(plain.parameters())), handle.stats()["bytes_sent"]


def test_one_rank_is_no_hook(ranks):
    assert ranks(1).run(alone) == [(True, 0)]


def drifting(rank, n, grouped_gradients):
    """The squared distance between replicas early and late; gradients averaged in shuffled groups do not hold them."""
    model = mlp()
    ddp = wrap(model)
    optimizer, batches = sgd(ddp), data(rank)
    if grouped_gradients:
        ddp.register_comm_hook(None, noop_hook)
        averager = DivideAndShuffleAverager(DivideAndShuffle(group_size=2))
    else:
        handle = thinwire.attach(ddp, DivideAndShuffle(group_size=2), optimizer=optimizer)
    distances = []
    for t in range(200):
        optimizer.zero_grad()
        x, y = next(batches)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(7 * t + rank))
        ((ddp(x) - y + noise) ** 2).mean().backward()
        if grouped_gradients:
            grads = [torch.nn.Parameter(p.grad) for p in model.parameters()]
            averager.average_parameters(grads)
            for p, grad in zip(model.parameters(), grads):
                p.grad.copy_(grad.data)
        optimizer.step()
        if t in (49, 199):
            everyone = of_every_rank(flat(model.parameters()))
            distances.append(float((everyone - everyone.mean(0)).square().sum(1).mean()))
    if not grouped_gradients:
        assert handle.consistency()["consensus_distance"] == pytest.approx(distances[-1], rel=1e-3)
    return distances


def test_averaging_gradients_alone_lets_replicas_drift(ranks):
    shuffled = ranks(4).run(drifting, False)[0]
    gradients = ranks(4).run(drifting, True)[0]
    assert gradients[1] > 2.5 * gradients[0]  # a random walk
    assert shuffled[1] < 2.5 * shuffled[0]
    assert gradients[1] > 5 * shuffled[1]


# ---- buffers and the optimizer's state ----


def buffers(rank, n, average):
    model, ddp, optimizer, handle = start(
        DivideAndShuffle(group_size=2, average_buffers=average), build=with_batchnorm
    )
    batches = data(rank)
    for _ in range(4):
        x, y = next(batches)
        step(ddp, optimizer, (x + rank, y))
    norm = model[1]
    return of_every_rank(norm.running_mean), int(norm.num_batches_tracked), ddp.broadcast_buffers


def test_buffers_are_averaged_in_the_group_and_nowhere_else(ranks):
    for running, tracked, broadcast in ranks(4).run(buffers, True):
        # The fourth round is {0,3} {1,2}.
        assert torch.equal(running[0], running[3]) and torch.equal(running[1], running[2])
        assert not torch.equal(running[0], running[1])
        assert tracked == 4 and broadcast is False
    for running, _, _ in ranks(4).run(buffers, False):
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(running, 2))


def moments(rank, n, optimizer, average):
    model, ddp, opt, handle = start(DivideAndShuffle(average_optimizer_state=average), optimizer)
    batches, equal = data(rank), []
    for _ in range(4):
        step(ddp, opt, next(batches))
        members = handle.method.partitions(n)[handle._rounds.done - 1 & 1]
        mine = next(group for group in members if rank in group)
        kept = flat(opt.state[p]["exp_avg" if optimizer == "adamw" else "momentum_buffer"] for p in model.parameters())
        everyone = of_every_rank(kept)
        equal.append(torch.equal(everyone[mine[0]], everyone[mine[1]]))
    return equal


def test_adams_moments_are_averaged_and_sgds_momentum_is_not(ranks):
    assert ranks(4).run(moments, "adamw", "auto") == [[True] * 4] * 4
    assert ranks(4).run(moments, "adamw", False) == [[False] * 4] * 4
    assert ranks(4).run(moments, "sgd", "auto") == [[False] * 4] * 4


def moments_now_and_then(rank, n, every):
    """Averaged every second round, where parameters always meet the same partition: the moments must not."""
    model, ddp, opt, handle = start(DivideAndShuffle(average_optimizer_state=every), "adamw")
    met = []
    batches = data(rank)
    for _ in range(8):
        met.append(handle._rounds.moment_members(every))
        step(ddp, opt, next(batches))
    return met


def test_moments_have_a_cycle_of_their_own(ranks):
    met = ranks(4).run(moments_now_and_then, 2)[0]
    assert met == [None, (0, 1), None, (0, 3), None, (0, 1), None, (0, 3)]


# ---- evaluation and checkpoints ----


class Stop(Exception):
    pass


def averaged(rank, n, overlap):
    model, ddp, optimizer, handle = start(DivideAndShuffle(overlap=overlap), "adamw", with_batchnorm)
    batches = data(rank)
    for _ in range(5):
        step(ddp, optimizer, next(batches))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    everyone = of_every_rank(flat(model.parameters()))
    with handle.evaluating() as mean:
        assert mean is model
        same = equal_on_all_ranks(list(model.state_dict().values()))
        gap = float((flat(model.parameters()) - everyone.mean(0)).abs().max())
        storages = [p.data_ptr() for p in model.parameters()]
    raised = False
    try:
        with handle.evaluating():
            raise Stop
    except Stop:
        raised = True
    restored = all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    moved = storages != [p.data_ptr() for p in model.parameters()]
    step(ddp, optimizer, next(batches))
    apart = equal_on_all_ranks(list(model.parameters()))
    handle.finalize()
    tensors = [*model.state_dict().values(), *(optimizer.state[p]["exp_avg"] for p in model.parameters())]
    return same, gap, raised and restored, moved, apart, equal_on_all_ranks(tensors)


@pytest.mark.parametrize("overlap", ["none", "bucket", "delayed"])
def test_the_model_evaluated_is_the_same_everywhere_and_leaves_no_trace(ranks, overlap):
    for same, gap, restored, moved, apart, final in ranks(4).run(averaged, overlap):
        assert same and gap < 1e-6
        assert restored and not moved
        assert not apart and final


def stepping_inside(rank, n):
    model, ddp, optimizer, handle = start(DivideAndShuffle())
    before = flat(model.parameters())
    try:
        with handle.evaluating():
            step(ddp, optimizer, next(data(rank)))
    except RuntimeError as error:
        return str(error), torch.equal(before, flat(model.parameters()))


def test_a_step_inside_evaluating_is_refused(ranks):
    for said, restored in ranks(2).run(stepping_inside):
        assert "would be undone" in said and restored


def resumed(rank, n, method, optimizer, folder):
    with small_pieces():
        return _resumed(rank, method, optimizer, folder)


def _resumed(rank, method, optimizer, folder):
    def trained(steps, model, ddp, opt):
        for _ in range(steps):
            step(ddp, opt, next(batches))

    batches = data(rank)
    model, ddp, opt, handle = start(method, optimizer, with_batchnorm)
    trained(5, model, ddp, opt)
    path = f"{folder}/{rank}.pt"
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict(), "thinwire": handle.state_dict()}, path)
    saved_batches = copy.deepcopy(list(itertools.islice(batches, 6)))
    batches = iter(saved_batches)
    trained(6, model, ddp, opt)
    through = state_of(model, opt)
    handle.close()

    batches = iter(saved_batches)
    model, ddp, opt, handle = start(method, optimizer, with_batchnorm)
    saved = torch.load(path)  # weights_only
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    handle.load_state_dict(saved["thinwire"])
    trained(6, model, ddp, opt)
    return torch.equal(through, state_of(model, opt)), handle.state_dict()["round"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", [
    DivideAndShuffle(), DivideAndShuffle(overlap="bucket", schedule="random"), DivideAndShuffle(overlap="delayed"),
    DivideAndShuffle(schedule=schedules.Random(3), global_every=4),
    DivideAndShuffle(blocks=BlockSparse("shared", density=0.25, block_size=16)),
], ids=lambda m: f"{m.overlap}-{m.schedule}-{m.global_every}")  # fmt: skip
def test_resumed_is_uninterrupted(ranks, tmp_path, method, optimizer):
    assert ranks(3).run(resumed, method, optimizer, str(tmp_path)) == [(True, 11)] * 3


def resumed_in_part(rank, n):
    model, ddp, optimizer, handle = start(DivideAndShuffle())
    step(ddp, optimizer, next(data(rank)))
    state = handle.state_dict()
    if rank != 1:
        state["round"] = 9
    handle.load_state_dict(state)
    try:
        step(ddp, optimizer, next(data(rank)))
    except ValueError as error:
        return str(error)


def test_ranks_in_different_rounds_are_an_error(ranks):
    for said in ranks(3).run(resumed_in_part):
        assert "round: 9 on rank 0,2, 1 on rank 1" in said


def test_a_state_that_does_not_fit_is_refused(ranks):
    for said in ranks(2).run(misfits):
        assert "not a state of DivideAndShuffle" in said[0]
        assert "rank" in said[1] and "finalize" in said[1]
        assert "0.weight" in said[2]


def misfits(rank, n):
    model, ddp, optimizer, handle = start(DivideAndShuffle(overlap="delayed"))
    step(ddp, optimizer, next(data(rank)))
    state, said = handle.state_dict(), []
    wrong = copy.deepcopy(state)
    wrong["pending"]["parameters"]["0.weight"] = torch.zeros(3)
    for bad in ({"format": 7}, state | {"rank": 1 - rank}, wrong):
        try:
            handle.load_state_dict(bad)
        except ValueError as error:
            said.append(str(error))
    return said


# ---- ways of training ----


def accumulated(rank, n):
    model, ddp, optimizer, handle = start(DivideAndShuffle())
    batches = data(rank)
    for _ in range(3):
        optimizer.zero_grad()
        with ddp.no_sync():
            x, y = next(batches)
            ((ddp(x) - y) ** 2).mean().backward()
        x, y = next(batches)
        ((ddp(x) - y) ** 2).mean().backward()
        optimizer.step()
    return handle.stats()["steps"]


def test_one_round_a_step_however_many_backward_passes(ranks):
    assert ranks(2).run(accumulated) == [3, 3]


def closures(rank, n, kind):
    model = mlp(layers=3)
    ddp = wrap(model)
    optimizer = sgd(ddp) if kind == "sgd" else torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3 + rank)
    handle = thinwire.attach(ddp, DivideAndShuffle(overlap="bucket" if kind == "sgd" else "none"), optimizer=optimizer)
    batches = data(rank)
    for _ in range(3):
        x, y = next(batches)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = ((ddp(x) - y) ** 2).mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
    handle.finalize()
    return handle.stats()["steps"], math.isfinite(float(loss)), equal_on_all_ranks(list(model.parameters()))


@pytest.mark.parametrize("kind", ["sgd", "lbfgs"])
def test_steps_with_a_closure(ranks, kind):
    assert ranks(2).run(closures, kind) == [(3, True, True)] * 2


def skipping(rank, n, method, bad_step):
    """inf on rank 1 alone: it skips the step, and still averages with its group."""
    with small_pieces():
        return _skipping(rank, method, bad_step)


def _skipping(rank, method, bad_step):
    model = with_batchnorm()
    ddp = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    handle = thinwire.attach(ddp, method, optimizer=optimizer, grad_scaler=scaler)
    batches, steps = data(rank), []
    for t in range(6):
        x, y = next(batches)
        loss = ((ddp(x) - y) ** 2).mean()
        optimizer.zero_grad()
        scaler.scale(loss * float("inf") if t == bad_step and rank == 1 else loss).backward()
        before = [float(optimizer.state[p].get("step", 0)) for p in model.parameters()][0]
        scaler.step(optimizer)
        scaler.update()
        steps.append([float(optimizer.state[p].get("step", 0)) for p in model.parameters()][0] - before)
        everyone = of_every_rank(flat(model.parameters()))
        assert torch.isfinite(everyone).all()
    apart = handle.consistency()["consensus_distance"]
    rounds = handle.stats()["steps"]
    handle.close()
    return steps, rounds, apart, "step" in scaler.__dict__


@pytest.mark.parametrize("bad_step", [0, 3])
@pytest.mark.parametrize("overlap", ["none", "bucket", "delayed"])
def test_a_step_that_one_rank_skips(ranks, overlap, bad_step):
    results = ranks(4).run(skipping, DivideAndShuffle(overlap=overlap), bad_step)
    for rank, (steps, rounds, apart, patched) in enumerate(results):
        assert steps == [0.0 if rank == 1 and t == bad_step else 1.0 for t in range(6)]
        assert rounds == 6 and apart < 1.0 and not patched


def first_step_skipped(rank, n):
    """Rank 1 skips its first step, so only rank 0 has moments: their mean is rank 0's own."""
    model = mlp()
    ddp = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    thinwire.attach(ddp, DivideAndShuffle(), optimizer=optimizer, grad_scaler=scaler)
    x, y = next(data(rank))
    scaler.scale(((ddp(x) - y) ** 2).mean() * (float("inf") if rank else 1.0)).backward()
    scaler.step(optimizer)
    if rank:
        return not optimizer.state
    return all(torch.allclose(optimizer.state[p]["exp_avg"], 0.1 * p.grad) for p in model.parameters())


def test_moments_are_averaged_over_the_ranks_that_have_them(ranks):
    assert ranks(2).run(first_step_skipped) == [True, True]


def left_out(rank, n):
    """A loop of one's own that leaves out a step."""
    model, ddp, optimizer, handle = start(DivideAndShuffle())
    for t, (x, y) in enumerate(itertools.islice(data(rank), 4)):
        optimizer.zero_grad()
        ((ddp(x) - y) ** 2).mean().backward()
        if t == 2 and rank == 0:
            handle.skip_step()
        else:
            optimizer.step()
    return handle.stats()["steps"]


def test_a_step_left_out_by_hand(ranks):
    assert ranks(2).run(left_out) == [4, 4]


def two_models(rank, n):
    """Two models in turns equal each alone."""
    results = []
    for together in (True, False):
        pairs = [start(DivideAndShuffle(schedule="ring"), build=lambda seed=seed: mlp(seed=seed)) for seed in (1, 2)]
        streams = [data(rank, seed=seed) for seed in (1, 2)]
        order = [0, 1] * 5 if together else [0] * 5 + [1] * 5
        for i in order:
            step(pairs[i][1], pairs[i][2], next(streams[i]))
        results.append(flat(p for pair in pairs for p in pair[0].parameters()))
    return torch.equal(*results)


def test_two_models_in_one_process(ranks):
    assert all(ranks(3).run(two_models))


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.frozen, self.last = (torch.nn.Linear(40, 40) for _ in range(3))
        self.last.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))


def conventional(rank, n):
    """PostLocalSGDOptimizer with our averager, over two parameter groups, a frozen layer and tied weights."""
    torch.manual_seed(rank)
    model = Tied()
    with torch.no_grad():
        for p in model.parameters():
            dist.broadcast(p, 0)
        model.frozen.weight.add_(rank)  # must be left alone
    ddp = wrap(model, init_sync=False)
    ddp.register_comm_hook(None, noop_hook)
    groups = [{"params": list(model.first.parameters())}, {"params": [model.last.bias], "lr": 0.01}]
    averager = DivideAndShuffleAverager(DivideAndShuffle(group_size=2))
    optimizer = PostLocalSGDOptimizer(torch.optim.SGD(groups, lr=0.05), averager)
    frozen = model.frozen.weight.clone()
    batches = data(rank)
    for _ in range(2):
        optimizer.zero_grad()
        x, y = next(batches)
        ((ddp(x) - y) ** 2).mean().backward()
        optimizer.step()
    everyone = of_every_rank(flat([model.first.weight, model.first.bias, model.last.bias]))
    mates = torch.equal(everyone[0], everyone[3]) and torch.equal(everyone[1], everyone[2])
    saved = optimizer.state_dict()["step"]
    return mates, torch.equal(frozen, model.frozen.weight), saved, averager.stats()["steps"]


def test_as_a_model_averager_of_pytorchs(ranks):
    assert ranks(4).run(conventional) == [(True, True, 2, 2)] * 4


def in_blocks(rank, n, density):
    model, ddp, optimizer, handle = start(
        DivideAndShuffle(group_size=n, blocks=BlockSparse("shared", density=density, block_size=16, dense_below=20))
    )
    batches = data(rank)
    gaps, shares = [], []
    for _ in range(4):
        x, y = next(batches)
        optimizer.zero_grad()
        ((ddp(x) - y) ** 2).mean().backward()
        twin = copy.deepcopy(model)  # makes the same step alone
        for p, q in zip(twin.parameters(), model.parameters()):
            p.grad = q.grad.clone()
        twin_optimizer = OPTIMIZERS["sgd"](twin.parameters())
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        twin_optimizer.step()
        local = of_every_rank(flat(twin.parameters()))
        optimizer.step()
        after = of_every_rank(flat(model.parameters()))
        gaps.append(float((after.mean(0) - local.mean(0)).abs().max()))
        averaged = (after == after[0]).all(0) & ~(local == local[0]).all(0)
        kept = (after == local).all(0)
        assert bool((averaged | kept).all())
        shares.append(float(averaged.double().mean()))
    return max(gaps), shares, handle.stats()["compression"]


def test_blocks_of_the_parameters(ranks):
    for gap, shares, compression in ranks(2).run(in_blocks, 0.25):
        assert gap < 1e-6
        assert all(0.2 < share < 0.35 for share in shares)
        assert 3 < compression < 5


# ---- what may go wrong around it ----


def two_scalers(rank, n, first_closed):
    """Two models with one GradScaler: closing one, in either order, leaves the other at work."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    own = scaler.step
    pairs = [start(DivideAndShuffle(), grad_scaler=scaler) for _ in range(2)]
    pairs[first_closed][3].close()
    _, ddp, optimizer, handle = pairs[1 - first_closed]
    batches = data(rank)
    for t in range(3):
        x, y = next(batches)
        loss = ((ddp(x) - y) ** 2).mean()
        optimizer.zero_grad()
        scaler.scale(loss * float("inf") if t == 1 and rank == 0 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    counted = handle.stats()["steps"], pairs[first_closed][3].stats()["steps"]
    handle.close()
    return counted, first_closed == 0 or scaler.step == own


@pytest.mark.parametrize("first_closed", [0, 1])
def test_two_models_share_a_scaler(ranks, first_closed):
    assert ranks(2).run(two_scalers, first_closed) == [((3, 0), True)] * 2


def closed(rank, n):
    model, ddp, optimizer, handle = start(DivideAndShuffle(), ddp_options={"broadcast_buffers": True})
    batches = data(rank)
    step(ddp, optimizer, next(batches))
    differed = not equal_on_all_ranks(model.parameters())
    during = ddp.broadcast_buffers
    handle.close()
    del handle, optimizer
    for _ in range(2):
        step(ddp, sgd(model), next(batches))
    return differed, during, ddp.broadcast_buffers, equal_on_all_ranks(model.parameters())


def test_after_close_replicas_are_equal_and_do_not_drift(ranks):
    assert ranks(4).run(closed) == [(True, False, True, True)] * 4


def copied(rank, n):
    model, ddp, optimizer, handle = start(DivideAndShuffle())
    step(ddp, optimizer, next(data(rank)))
    with logged() as said:
        twin = copy.deepcopy(ddp)
    twin_optimizer = sgd(twin)
    again = thinwire.attach(twin, DivideAndShuffle(), optimizer=twin_optimizer)
    step(twin, twin_optimizer, next(data(rank)))
    return said, again.stats()["steps"], handle.stats()["steps"]


def test_a_copied_model_says_so_and_can_be_attached(ranks):
    for said, twin_steps, steps in ranks(2).run(copied):
        assert len(said) == 1 and "thinwire.attach" in said[0]
        assert twin_steps == steps == 1


def collected(rank, n):
    model, ddp, optimizer, handle = start(DivideAndShuffle())
    step(ddp, optimizer, next(data(rank)))
    handle.close()
    watched = weakref.ref(ddp)
    del model, ddp, optimizer, handle
    gc.collect()
    return watched() is None


def test_a_model_that_is_done_with_is_freed(ranks):
    assert ranks(2).run(collected) == [True, True]


def late_hook(rank, n):
    model, ddp, optimizer, _ = start(DivideAndShuffle(overlap="bucket"))
    optimizer.register_step_pre_hook(lambda *_: None)
    try:
        step(ddp, optimizer, next(data(rank)))
    except RuntimeError as error:
        return str(error), sum(len(group["params"]) for group in optimizer.param_groups)


def test_a_pre_hook_that_would_come_too_late_is_refused(ranks):
    for said, parameters in ranks(2).run(late_hook):
        assert "before thinwire.attach" in said and parameters == 12


def half_resumed(rank, n):
    """With delayed, an average of moments is under way, and the optimizer was not loaded."""
    model, ddp, optimizer, handle = start(DivideAndShuffle(overlap="delayed"), "adamw")
    step(ddp, optimizer, next(data(rank)))
    state = handle.state_dict()
    model, ddp, optimizer, handle = start(DivideAndShuffle(overlap="delayed"), "adamw")
    handle.load_state_dict(state)
    try:
        handle.finalize()
    except RuntimeError as error:
        return str(error)


def test_an_optimizer_that_was_not_loaded_is_noticed(ranks):
    for said in ranks(2).run(half_resumed):
        assert "load its state_dict" in said


# ---- refusals ----


def refusal(rank, n, build):
    begin = time.monotonic()
    try:
        build(rank)
    except (TypeError, ValueError) as error:
        return str(error), time.monotonic() - begin
    return "nothing was raised", 0.0


def different(methods):
    def build(rank):
        model = mlp(layers=5)
        thinwire.attach(wrap(model), methods[rank], optimizer=sgd(model))

    return build


def sizes_differ(rank):
    different([DivideAndShuffle(group_size=2)] * 2 + [DivideAndShuffle(group_size=3)])(rank)


def schedules_differ(rank):
    different([DivideAndShuffle(), DivideAndShuffle(schedule=schedules.Random(3)), DivideAndShuffle()])(rank)


def too_large(rank):
    different([DivideAndShuffle(group_size=4)] * 3)(rank)


def not_its_parameters(rank):
    model = mlp(layers=5)
    optimizer = sgd(mlp(layers=5) if rank == 1 else model)
    thinwire.attach(wrap(model), DivideAndShuffle(), optimizer=optimizer)


def no_optimizer(rank):
    thinwire.attach(wrap(mlp(layers=5)), DivideAndShuffle())


def unknown_in_pieces(rank):
    model = mlp(layers=5)
    optimizer = torch.optim.LBFGS(model.parameters())
    thinwire.attach(wrap(model), DivideAndShuffle(overlap="bucket"), optimizer=optimizer)


def no_moments(rank):
    model = mlp(layers=5)
    thinwire.attach(wrap(model), DivideAndShuffle(average_optimizer_state=2), optimizer=sgd(model))


def buffers_differ(rank):
    model = with_batchnorm()
    if rank == 2:
        model.register_buffer("more", torch.zeros(3))
    thinwire.attach(wrap(model, init_sync=False), DivideAndShuffle(), optimizer=sgd(model))


def hooked_already(rank):
    model = mlp(layers=5)
    ddp = wrap(model)
    if rank == 1:
        ddp.register_comm_hook(None, noop_hook)
    thinwire.attach(ddp, DivideAndShuffle(), optimizer=sgd(model))


def by_hook_state(rank):
    thinwire.HookState(DivideAndShuffle(), mlp())


@pytest.mark.parametrize(("build", "says"), [
    (sizes_differ, "group_size: 2 on rank 0,1, 3 on rank 2"),
    (schedules_differ, "schedule: butterfly on rank 0,2, Random(family=3) on rank 1"),
    (too_large, "there are only 3 ranks"),
    (not_its_parameters, "the optimizer does not own 10 of the model's 10"),
    (no_optimizer, "pass optimizer="),
    (unknown_in_pieces, "overlap='bucket'"),
    (no_moments, "SGD has none"), (buffers_differ, "model: 14 parameters and buffers"),
    (hooked_already, "(noop_hook); DDP allows one. Take out what registers it"),
    (by_hook_state, "averages parameters, not gradients"),
])  # fmt: skip
def test_refused_on_every_rank(ranks, build, says):
    for said, seconds in ranks(3).run(refusal, build):
        assert says in said
        assert seconds < 30


def joining(rank, n):
    model, ddp, optimizer, _ = start(DivideAndShuffle())
    try:
        with ddp.join():
            step(ddp, optimizer, next(data(rank)))
    except RuntimeError as error:
        return str(error)


def test_join_is_refused(ranks):
    for said in ranks(2).run(joining):
        assert "join()" in said and "same number of batches" in said


@pytest.mark.parametrize("wrong", [
    {"group_size": 1}, {"group_size": 2.0}, {"schedule": "star"}, {"overlap": "all"}, {"global_every": -1},
    {"average_optimizer_state": 0}, {"average_optimizer_state": "often"}, {"average_buffers": "yes"}, {"seed": -1},
    {"blocks": BlockSparse()}, {"blocks": BlockSparse("shared", memory="error_feedback")}, {"blocks": 0.5},
    {"blocks": BlockSparse("shared"), "overlap": "delayed"},
])  # fmt: skip
def test_wrong_values_are_refused_where_they_are_made(wrong):
    with pytest.raises((TypeError, ValueError), match=str(next(iter(wrong)))):
        DivideAndShuffle(**wrong)


def test_methods_are_values():
    assert DivideAndShuffle() == DivideAndShuffle() and hash(DivideAndShuffle()) == hash(DivideAndShuffle())
    assert "schedule='butterfly'" in repr(DivideAndShuffle())
