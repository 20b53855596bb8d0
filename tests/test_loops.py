"""What loops do with gradients: which backward passes belong to a step, which are thrown away, and what must not care.

Losses are linear in the parameters, so every gradient is known. What was applied and what waits must come to what was
due: the sum of the mean gradients of the passes whose steps were made.
"""

import copy
import random

import pytest
import torch
import torch.distributed as dist
from models import attach, data, equal_on_all_ranks, flat, mlp, wrap
from thinwire import BlockSparse, Dense, DivideAndShuffle, Elastic
from torch.utils.checkpoint import checkpoint

NOMINATED = BlockSparse("nominated", density=0.05, block_size=16)
TOPK = BlockSparse("topk", density=0.05, block_size=16)
MOMENTUM = BlockSparse("topk", density=0.1, block_size=16, momentum=0.9)
VARIATE = BlockSparse("shared", density=0.3, block_size=16, memory="control_variate")
ALL_LATE, SOME_LATE = Elastic(Dense(), beta=0.0), Elastic(NOMINATED, beta=0.5)
GUESSING, ARRIVING = Elastic(Dense(), beta=0.0, speculate=True), Elastic(Dense(), beta=0.3, decide="arrival")
CONSERVING = [Dense(), NOMINATED, TOPK, ALL_LATE, SOME_LATE, GUESSING, ARRIVING]
LR = 0.1


def name_of(method):
    return repr(method)[:60]


class Given(torch.nn.Module):
    """A model whose gradient is what it is called with."""

    def __init__(self, shapes=((40, 40), (40,), (40, 40), (40,), (40, 40))):
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes])

    def forward(self, gradient):
        return sum((p * one).sum() for p, one in zip(self.weights, gradient, strict=True))


class Loop:
    """A model under a method, and what is due to it."""

    def __init__(self, rank, method, optimizer_known=True, model=Given, **options):
        self.model = model()
        self.ddp = wrap(self.model, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.handle = attach(self.ddp, method, self.optimizer if optimizer_known else None)
        self._draw = torch.Generator().manual_seed(rank)
        self._passes, self._due = [], torch.zeros(sum(p.numel() for p in self.model.parameters()), dtype=torch.float64)

    def backward(self, times=1.0, sync=True):
        gradient = [times * torch.randn(p.shape, generator=self._draw) for p in self.model.parameters()]
        if sync:
            self.ddp(gradient).backward()
        else:
            with self.ddp.no_sync():
                self.ddp(gradient).backward()
        self._passes.append(flat(gradient))

    def step(self):
        self.optimizer.step()
        self._due += sum(self._passes)
        self.optimizer.zero_grad()
        self._passes = []

    def clear(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)
        self._passes = []

    def skip(self):
        self.handle.skip_step()
        self.clear()

    def usual(self, steps=3):
        for _ in range(steps):
            self.backward()
            self.step()

    def missing(self):
        """How far what was applied and what waits are from what was due, in shares of it."""
        self.handle.finalize()
        waits = self.handle.state_dict().get("memory", {}).get("residual", {})
        kept = [waits[name] if name in waits else torch.zeros(p.numel()) for name, p in self.model.named_parameters()]
        here = torch.stack([-flat(self.model.parameters()) / LR + flat(kept), self._due])
        dist.all_reduce(here)
        return float((here[0] - here[1]).norm() / here[1].norm())


# ---- gradients that are thrown away ----


def cleared(rank, n, method, options):
    """A GAN's: another loss leaves gradients, which are cleared, in every step."""
    loop = Loop(rank, method, **options)
    for _ in range(12):
        loop.backward()
        loop.step()
        loop.backward(times=7.0)
        loop.clear()
    return loop.missing(), equal_on_all_ranks(loop.model.parameters())


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True, "static_graph": True}], ids=len)
@pytest.mark.parametrize("method", CONSERVING, ids=name_of)
def test_gradients_that_are_cleared_change_nothing(ranks, method, options):
    for missing, equal in ranks(2).run(cleared, method, options):
        assert missing < 1e-5 and equal


def put_back(rank, n, method, how, steps):
    """Whether a state is bit for bit what it was once the passes since are void."""
    loop = Loop(rank, method)
    loop.usual(steps)
    before = loop.handle.state_dict()
    loop.backward(times=3.0)
    loop.backward(times=3.0)  # in the first step DDP has put parameters into other buckets by now
    if how == "skipped":
        loop.skip()
    else:
        loop.clear(set_to_none=how == "None")
    after = loop.handle.state_dict()
    moved = any(not torch.equal(before["memory"][kind].get(name, torch.zeros(len(t))), t)
                for kind, tensors in after["memory"].items() for name, t in tensors.items())  # fmt: skip
    late = [one["tensors"] for one in before.get("late", ())], [one["tensors"] for one in after.get("late", ())]
    same = len(late[0]) == len(late[1]) and all(torch.equal(a[k], b[k]) for a, b in zip(*late) for k in a)
    loop.usual()
    conserves = method not in (MOMENTUM, VARIATE)
    return not moved and same, loop.missing() if conserves else 0.0


DROPS = [("skipped", 0), ("skipped", 3), ("None", 3), ("zeros", 3)]
DROPPING = [NOMINATED, TOPK, MOMENTUM, VARIATE, SOME_LATE, ALL_LATE]


@pytest.mark.parametrize(("method", "how", "steps"), [
    (method, how, steps) for method in DROPPING for how, steps in DROPS
    if how != "zeros" or method not in (SOME_LATE, ALL_LATE)  # whose late gradients are zeros too: see the next test
], ids=str)  # fmt: skip
def test_a_dropped_step_leaves_the_state_bit_for_bit(ranks, method, how, steps):
    for same, missing in ranks(2).run(put_back, method, how, steps):
        assert same and missing < 1e-5


def zeros_of_late(rank, n):
    """Gradients that are zero because they are late, in a loop that takes two passes for a step."""
    loop = Loop(rank, ALL_LATE)
    for _ in range(6):
        loop.backward()
        loop.backward()
        loop.step()
    return loop.missing()


def test_a_gradient_that_is_zero_because_it_is_late_was_not_cleared(ranks):
    assert max(ranks(2).run(zeros_of_late)) < 1e-5


def left_out(rank, n, method, say, optimizer_known):
    """One batch's gradient is far too large, and its step is left out by its norm."""
    loop, skipped = Loop(rank, method, optimizer_known), []
    for t in range(30):
        loop.backward(times=1e5 if t == 7 else 1.0)
        norm = torch.nn.utils.get_total_norm([p.grad for p in loop.model.parameters()])
        dist.all_reduce(norm, op=dist.ReduceOp.MAX)
        if norm > 2e4:
            skipped.append(t)
            loop.skip() if say else loop.clear()
        else:
            loop.step()
    return skipped, loop.missing()


@pytest.mark.parametrize("say", [False, True])
@pytest.mark.parametrize("method", [m for m in CONSERVING if m not in (GUESSING, ARRIVING)], ids=name_of)
def test_one_step_is_left_out_and_its_batch_alone_is_missing(ranks, method, say):
    for skipped, missing in ranks(2).run(left_out, method, say, True):
        assert skipped == [7] and missing < 1e-4


def skipping_unseen(rank, n):
    loop = Loop(rank, NOMINATED, optimizer_known=False)
    loop.usual()
    loop.backward()
    with pytest.raises(RuntimeError, match="pass optimizer="):
        loop.handle.skip_step()
    free = Loop(rank, BlockSparse(), optimizer_known=False)
    free.backward()
    free.handle.skip_step()
    return True


def test_a_step_cannot_be_skipped_where_nothing_was_kept_to_go_back_to(ranks):
    assert all(ranks(2).run(skipping_unseen))


class Both(torch.nn.Module):
    """Two nets in one model, with an optimizer for each."""

    def __init__(self):
        super().__init__()
        self.critic, self.generator = Given(), Given()

    def forward(self, of_critic, of_generator):
        loss = self.critic(of_critic)
        return loss if of_generator is None else loss + self.generator(of_generator)


def two_optimizers(rank, n):
    """attach knows the critic's optimizer alone: only the critic's gradients can be found to have been dropped."""
    model = Both()
    ddp = wrap(model, find_unused_parameters=True)
    critics, generators = (torch.optim.SGD(one.parameters(), lr=LR) for one in (model.critic, model.generator))
    handle = attach(ddp, TOPK, critics)
    draw = torch.Generator().manual_seed(rank)
    due = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in model.named_parameters()}

    def take(kind):
        gradient = [torch.randn(p.shape, generator=draw) for p in model.critic.parameters()]
        other = None if kind == "critic" else [torch.randn(one.shape, generator=draw) for one in gradient]
        ddp(gradient, other).backward()
        for i, one in enumerate(gradient if kind == "critic" else other):
            due[f"{kind}.weights.{i}"] += one.double().flatten()

    for _ in range(8):
        take("critic")
        critics.step()
        critics.zero_grad()
        take("generator")
        generators.step()
        generators.zero_grad()
        critics.zero_grad()
    waits = handle.state_dict()["memory"]["residual"]
    wrong = []
    for name, p in model.named_parameters():
        here = torch.stack([-p.detach().double().flatten() / LR + waits[name], due[name]])
        dist.all_reduce(here)
        wrong.append(float((here[0] - here[1]).norm() / here[1].norm()))
    return max(wrong)


def test_what_another_optimizer_steps_is_taken(ranks):
    assert max(ranks(2).run(two_optimizers)) < 1e-5


def used_again(rank, n, what):
    """Gradients that were skipped and not cleared: a step, or another pass, must not use them."""
    loop = Loop(rank, NOMINATED)
    loop.usual()
    loop.backward()
    loop.handle.skip_step()
    with pytest.raises(RuntimeError, match="clear them first"):
        loop.optimizer.step() if what == "step" else loop.backward()
    return True


@pytest.mark.parametrize("what", ["step", "backward"])
def test_what_was_skipped_is_not_used_again(ranks, what):
    assert all(ranks(2).run(used_again, what))
    ranks(2).stop()  # they may be in the middle of a backward pass


def first_dropped(rank, n, method, how):
    """A resumed run, or one that goes back, whose first pass, or last one before that, is thrown away."""
    loop = Loop(rank, method)
    loop.usual()
    saved = loop.handle.state_dict()
    if how == "goes back":
        loop.backward()
        loop.clear()
    loop.handle.load_state_dict(saved)
    if how == "resumes":
        loop.backward()
        loop.skip()
    loop.usual()
    return loop.missing()


@pytest.mark.parametrize("how", ["resumes", "goes back"])
@pytest.mark.parametrize("method", [ALL_LATE, SOME_LATE, NOMINATED], ids=name_of)
def test_what_was_late_in_a_checkpoint_outlives_a_dropped_step(ranks, method, how):
    assert max(ranks(2).run(first_dropped, method, how)) < 1e-5


def ended_with_open(rank, n, method, verb):
    """The last step is left out, and gradients are not cleared before the end, or before an evaluation."""
    loop = Loop(rank, method)
    loop.usual(4)
    loop.backward(times=50.0)
    if verb == "finalize":
        loop.handle.finalize()
    else:
        with loop.handle.evaluating():
            there = -flat(loop.model.parameters()) / LR
        loop.clear()
        return float((there - average(loop._due)).norm() / average(loop._due).norm())
    loop.clear()
    loop.usual(1)
    return loop.missing()


def average(tensor):
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


@pytest.mark.parametrize("verb", ["finalize", "evaluating"])
@pytest.mark.parametrize("method", [ALL_LATE, GUESSING, ARRIVING], ids=name_of)
def test_a_pass_whose_step_was_not_made_is_in_no_end_and_no_evaluation(ranks, method, verb):
    assert max(ranks(2).run(ended_with_open, method, verb)) < 1e-5


def parts_dropped(rank, n, method):
    """Three passes for a step, of which some parameters' gradients are set to None, and which is then skipped."""
    loop = Loop(rank, method)
    loop.usual(4)
    for _ in range(2):
        loop.backward()
        loop.backward()
        for p in list(loop.model.parameters())[:2]:
            p.grad = None
        loop.backward()
        loop.skip()
        loop.usual(1)
    return loop.missing()


@pytest.mark.parametrize("method", [ALL_LATE, SOME_LATE, ARRIVING, TOPK], ids=name_of)
def test_what_is_void_does_not_come_back_by_parts(ranks, method):
    assert max(ranks(2).run(parts_dropped, method)) < 1e-5


def steps_in_evaluating(rank, n):
    loop = Loop(rank, ALL_LATE)
    loop.usual()
    with loop.handle.evaluating(), pytest.raises(RuntimeError, match="inside evaluating"):
        loop.optimizer.step()
    loop.usual()
    return loop.missing()


def test_a_step_inside_evaluating_is_refused(ranks):
    assert max(ranks(2).run(steps_in_evaluating)) < 1e-5


# ---- several passes for a step ----


def accumulated(rank, n, method, options):
    """Three synchronised passes, one that is not among them, for a step."""
    loop = Loop(rank, method, **options)
    for t in range(8):
        loop.backward()
        loop.backward(sync=t % 2 == 0)
        loop.backward()
        loop.step()
    return loop.missing(), equal_on_all_ranks(loop.model.parameters())


@pytest.mark.parametrize("options", [
    {}, {"gradient_as_bucket_view": True, "static_graph": True},
    pytest.param({"gradient_as_bucket_view": True}, marks=pytest.mark.full),
    pytest.param({"static_graph": True}, marks=pytest.mark.full),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("method", CONSERVING, ids=name_of)
def test_passes_that_all_synchronise_add_up(ranks, method, options):
    for missing, equal in ranks(2).run(accumulated, method, options):
        assert missing < 1e-5 and equal


def with_momentum(rank, n, every_pass):
    """A gradient of 1 in each of two passes."""
    model = Given(((8,),))
    ddp = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attach(ddp, BlockSparse("topk", density=1.0, momentum=0.9), optimizer)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        for turn in range(2):
            with ddp.no_sync() if not every_pass and turn == 0 else torch.enable_grad():
                ddp([torch.ones(8)]).backward()
        seen.append(model.weights[0].grad[0].item())
        optimizer.step()
    return seen


def test_momentum_decays_once_a_step(ranks):
    for every_pass in (True, False):
        for seen in ranks(2).run(with_momentum, every_pass):
            assert seen == pytest.approx([2.0, 3.8, 5.42])


def estimates(rank, n):
    """How many blocks the second of two passes changes in each of two parameters, and whether rightly scaled."""
    loop = Loop(rank, BlockSparse("shared", density=0.25, block_size=16))
    found = []
    for _ in range(4):
        loop.backward()
        first = [p.grad.clone() for p in loop.model.parameters()]
        loop.backward()
        change = [(p.grad - was).view(-1, 16) for p, was in zip(loop.model.parameters(), first) if p.dim() == 2]
        found.append([int((one.abs() > 1e-4).any(1).sum()) for one in change])
        loop.step()
    return found


def test_an_unbiased_estimate_is_not_estimated_again(ranks):
    for found in ranks(2).run(estimates):
        assert found == [[25, 25, 25]] * 4


def cleared_in_between(rank, n, method):
    """A pass, another without synchronisation, both thrown away before the one that counts."""
    loop = Loop(rank, method)
    for _ in range(6):
        loop.backward()
        loop.backward(sync=False)
        loop.clear()
        loop.backward()
        loop.step()
    return loop.missing()


@pytest.mark.parametrize("method", [NOMINATED, SOME_LATE, GUESSING], ids=name_of)
def test_what_is_cleared_after_several_passes_is_dropped(ranks, method):
    assert max(ranks(2).run(cleared_in_between, method)) < 1e-5


class Rewound(torch.nn.Module):
    """mlp() whose layers are computed again in the backward pass, each in a backward pass of its own."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        x = x.clone().requires_grad_()
        for i in range(0, len(self.layers), 2):
            x = checkpoint(self.layers[i : i + 2], x, use_reentrant=True)
        return x


def reentrant(rank, n, every_pass):
    model = Rewound()
    ddp = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = attach(ddp, BlockSparse("topk", density=1.0, block_size=16), optimizer)
    batches = data(rank)
    for _ in range(4):
        optimizer.zero_grad()
        for turn in range(2):
            x, y = next(batches)
            with ddp.no_sync() if not every_pass and turn == 0 else torch.enable_grad():
                ((ddp(x) - y) ** 2).mean().backward()
        optimizer.step()
    return flat(model.parameters()), handle.stats()["steps"]


def test_backward_passes_inside_backward_passes(ranks):
    (every, steps), (last, fewer) = (ranks(2).run(reentrant, every)[0] for every in (True, False))
    torch.testing.assert_close(every, last, rtol=1e-5, atol=1e-7)
    assert (steps, fewer) == (8, 4)


def at_random(rank, n, method, seed):
    """A loop that does one thing after another, the same on every rank; what is due is kept by parameter."""
    loop, choose = Loop(rank, method, gradient_as_bucket_view=bool(seed % 2)), random.Random(seed)
    parameters = list(loop.model.parameters())
    due, there = ([torch.zeros(p.shape, dtype=torch.float64) for p in parameters] for _ in range(2))

    def take(sync):
        gradient = [torch.randn(p.shape, generator=loop._draw) for p in parameters]
        with torch.enable_grad() if sync else loop.ddp.no_sync():
            loop.ddp(gradient).backward()
        for i, one in enumerate(gradient):
            there[i] += one

    def void(some, clear):
        for i in some:
            there[i].zero_()
            parameters[i].grad = None if clear else parameters[i].grad

    everything, last = range(len(parameters)), "step"
    for _ in range(60):
        then = ["local", "step", "step", "clear", "skip", "part", "save"] if last == "pass" else []
        what = choose.choice((["pass"] if last == "local" else ["pass"] * 4) + then)
        if what in ("pass", "local"):
            take(what == "pass")
        elif what == "step":
            loop.optimizer.step()
            for i in everything:
                due[i] += there[i]
            void(everything, True)
        elif what == "part":
            void(choose.sample(everything, 2), True)
            what = "pass"
        elif what == "save":
            loop.handle.state_dict()
            what = "pass"
        else:
            if what == "skip":
                loop.handle.skip_step()
            void(everything, True)
        last = what
    void(everything, True)
    loop._due = flat(due)
    return loop.missing(), equal_on_all_ranks(parameters)


@pytest.mark.parametrize("seed", [0, 1, *[pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 8)]])
@pytest.mark.parametrize("method", [TOPK, NOMINATED, ALL_LATE, SOME_LATE, ARRIVING, GUESSING], ids=name_of)
def test_whatever_a_loop_does_nothing_is_lost_and_nothing_comes_twice(ranks, method, seed):
    for missing, equal in ranks(2).run(at_random, method, seed):
        assert missing < 1e-5 and equal


# ---- buckets that DDP leaves out ----


class Unused(torch.nn.Module):
    """mlp() of which a layer is not used: the last one, whose bucket comes first, or the first one."""

    def __init__(self, unused):
        super().__init__()
        self.layers, self.unused = mlp(), unused

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = x if i == self.unused else layer(x)
        return x


def left_out_buckets(rank, n, method, unused):
    model = Unused(unused)
    ddp = wrap(model, find_unused_parameters=True, skip_all_reduce_unused_params=True)
    used = [p for name, p in model.named_parameters() if p.dim() == 2 and f".{unused}." not in name]
    before = [p.detach().clone() for p in used]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle, batches = attach(ddp, method, optimizer), data(rank)
    for t in range(24):
        model.unused = None if t % 4 == 3 else unused  # in some steps all are used
        x, y = next(batches)
        optimizer.zero_grad()
        ((ddp(x) - y) ** 2).mean().backward()
        optimizer.step()
    handle.finalize()
    still = sum(int((p == was).view(-1, 16).all(1).sum()) for p, was in zip(used, before))
    return equal_on_all_ranks(model.parameters()), handle.stats()["steps"], still


@pytest.mark.parametrize("unused", [0, 10])
@pytest.mark.parametrize("method", [BlockSparse("shared", density=0.5, block_size=16), NOMINATED,
                                    DivideAndShuffle(), ALL_LATE, SOME_LATE], ids=name_of)  # fmt: skip
def test_buckets_that_are_left_out(ranks, method, unused):
    for equal, steps, still in ranks(2).run(left_out_buckets, method, unused):
        assert equal and steps == 24
        assert still == 0 or getattr(method, "selection", None) != "shared"


# ---- the optimizer ----


def never_stepped(rank, n, method):
    """attach is given one optimizer, and another one trains."""
    model = mlp()
    ddp = wrap(model)
    given, other = (torch.optim.SGD(model.parameters(), lr=0.05) for _ in range(2))
    attach(ddp, method, given)
    batches = data(rank)
    for t in range(10):
        x, y = next(batches)
        other.zero_grad()
        try:
            ((ddp(x) - y) ** 2).mean().backward()
        except RuntimeError as error:
            return t, str(error)
        other.step()
    return None


@pytest.mark.parametrize("method", [NOMINATED, SOME_LATE, DivideAndShuffle()], ids=name_of)
def test_an_optimizer_that_is_never_stepped_is_named(ranks, method):
    for t, error in ranks(2).run(never_stepped, method):
        assert t < 8 and "SGD that was given as optimizer=" in error
    ranks(2).stop()  # they are in the middle of a backward pass


def sharpness_aware(rank, n, method, passes):
    """SAM: the gradient of the first pass moves the weights, that of the second, taken there, is stepped with."""
    loop = Loop(rank, method)
    for _ in range(8):
        loop.backward()
        with torch.no_grad():
            moves = [p.grad * 0.01 for p in loop.model.parameters()]
            torch._foreach_add_(list(loop.model.parameters()), moves)
        loop.clear()
        for _ in range(passes):
            loop.backward()
        with torch.no_grad():
            torch._foreach_sub_(list(loop.model.parameters()), moves)
        loop.step()
    return loop.missing() if not isinstance(method, DivideAndShuffle) else 0.0


@pytest.mark.parametrize("method", [NOMINATED, ALL_LATE, DivideAndShuffle()], ids=name_of)
def test_sharpness_aware_steps(ranks, method):
    assert max(ranks(2).run(sharpness_aware, method, 6)) < 1e-4


def moved_between_passes(rank, n, method):
    """Noise on the weights in each of many passes of a step, and a weight that is NaN from the beginning."""
    loop = Loop(rank, method)
    with torch.no_grad():
        loop.model.weights[1][0] = float("nan")
    for _ in range(8):
        with torch.no_grad():
            loop.model.weights[0] += 0.01
        loop.backward()
    loop.step()
    return bool(torch.isfinite(loop.model.weights[0]).all())


@pytest.mark.parametrize("method", [NOMINATED, ALL_LATE], ids=name_of)
def test_weights_may_move_between_the_passes_of_a_step(ranks, method):
    assert all(ranks(2).run(moved_between_passes, method))


def with_closures(rank, n):
    model = mlp()
    with pytest.raises(TypeError, match="differences of gradients"):
        attach(wrap(model), NOMINATED, torch.optim.LBFGS(model.parameters()))
    return True


def test_lbfgs_is_refused_where_blocks_are_left_out(ranks):
    assert all(ranks(2).run(with_closures))


def anothers_optimizer(rank, n, method):
    with pytest.raises(ValueError, match="owns none of the model's|does not own"):
        attach(wrap(mlp()), method, torch.optim.SGD(mlp().parameters(), lr=0.05))
    return True


@pytest.mark.parametrize("method", [Dense(), NOMINATED, SOME_LATE, DivideAndShuffle()], ids=name_of)
def test_an_optimizer_of_another_model_is_refused(ranks, method):
    assert all(ranks(2).run(anothers_optimizer, method))


def hooks_of(optimizer):
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


def left_behind(rank, n, method):
    loop = Loop(rank, method)
    loop.usual()
    copy.deepcopy(loop.model), copy.deepcopy(loop.optimizer)
    loop.handle.close()
    loop.usual()
    return len(hooks_of(loop.optimizer)), loop.missing()


@pytest.mark.parametrize("method", [Dense(), NOMINATED, ALL_LATE, DivideAndShuffle()], ids=name_of)
def test_close_takes_its_eyes_off(ranks, method):
    for hooks, _ in ranks(2).run(left_behind, method):
        assert hooks == 0


class PartlyUsed(Given):
    """With a parameter that no pass uses."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(8))

    def forward(self, gradient):
        return super().forward(gradient[1:])  # its own parameter comes before those of its parts


def outlier(rank, n, method, model, options):
    """The norm that a loop sees of a step whose gradient is a hundred times the usual."""
    loop, norms = Loop(rank, method, model=model, **options), []
    for t in range(12):
        loop.backward(times=100.0 if t == 8 else 1.0)
        some = [p.grad for p in loop.model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(some)))
        loop.step()
    return norms


@pytest.mark.parametrize(("model", "options"), [(Given, {}), (PartlyUsed, {"find_unused_parameters": True})])
@pytest.mark.parametrize("method", [ALL_LATE, Elastic(Dense(), beta=0.5, max_delay=2), GUESSING], ids=name_of)
def test_nothing_of_an_outlier_is_late(ranks, method, model, options):
    for norms in ranks(2).run(outlier, method, model, options):
        assert norms[8] > 20 * max(norms[:8] + norms[9:])
