"""What DDP users do: everything here must work as it does without thinwire."""

import copy
import time

import pytest
import thinwire
import torch
import torch.distributed as dist
from models import (
    ALL_METHODS,
    SMALL_BUCKET_MB,
    attach,
    data,
    equal_on_all_ranks,
    flat,
    label,
    learner,
    logged,
    mlp,
    sgd,
    step,
    watched,
    wrap,
)
from thinwire import BlockSparse, Dense, Elastic
from torch.nn.parallel import DistributedDataParallel

TOPK = BlockSparse("topk", density=0.1, block_size=16)
NOMINATED = BlockSparse("nominated", density=0.1, block_size=16)
SOME = [BlockSparse(block_size=16), TOPK, NOMINATED, BlockSparse("shared", density=0.3, memory="control_variate")]


def train(rank, n, method, build=learner, options=None, compiled=False):
    model = build()
    ddp = wrap(model, **(options or {}))
    forward = torch.compile(ddp, backend="eager") if compiled else ddp
    optimizer = sgd(ddp, lr=2.0)
    handle = attach(forward, method, optimizer)
    batches = data(rank)
    losses = [step(forward, optimizer, next(batches)) for _ in range(15)]
    learns = sum(losses[-3:]) < 0.65 * sum(losses[:3])  # dense averaging leaves 0.46 to 0.49, methods up to 0.55
    return equal_on_all_ranks(model.parameters()), learns, handle.stats()["steps"]


@pytest.mark.parametrize("method", SOME, ids=label)
@pytest.mark.parametrize(
    "options",
    [
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"bucket_cap_mb": 25},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ddp_options(ranks, method, options):
    assert ranks(2).run(train, method, learner, options) == [(True, True, 15)] * 2


@pytest.mark.parametrize("method", SOME, ids=label)
def test_compiled_ddp(ranks, method):
    assert ranks(2).run(train, method, learner, {"bucket_cap_mb": 25}, True) == [(True, True, 15)] * 2


def by_hand(rank, n, method):
    """PyTorch's own convention: nothing but a state and a function."""
    model = mlp()
    ddp = wrap(model)
    state = thinwire.HookState(method, model)
    ddp.register_comm_hook(state, thinwire.hook)
    optimizer, batches = sgd(ddp), data(rank)
    for _ in range(10):
        step(ddp, optimizer, next(batches))
    return flat(model.parameters()), sorted(state.state_dict()["memory"]["residual"]) == sorted(
        name for name, _ in model.named_parameters()
    )


def attached(rank, n, method):
    model = mlp()
    ddp = wrap(model)
    optimizer, batches = sgd(ddp), data(rank)
    attach(ddp, method)
    for _ in range(10):
        step(ddp, optimizer, next(batches))
    return flat(model.parameters())


def test_register_comm_hook_is_the_same_as_attach(ranks):
    parameters, named = ranks(2).run(by_hand, TOPK)[0]
    assert named and torch.equal(parameters, ranks(2).run(attached, TOPK)[0])


def accumulate(rank, n, method):
    """Two backward passes under no_sync and one without, against one backward of the sum."""
    results = []
    for split in (True, False):
        model = mlp()
        ddp = wrap(model)
        handle = attach(ddp, method)
        batches = [next(data(rank, seed=s)) for s in range(3)]
        losses = [lambda x=x, y=y: ((ddp(x) - y) ** 2).mean() for x, y in batches]
        if split:
            with ddp.no_sync():
                losses[0]().backward()
                losses[1]().backward()
            losses[2]().backward()
        else:
            with ddp.no_sync():
                (losses[0]() + losses[1]()).backward()
            losses[2]().backward()
        results.append((flat(p.grad for p in model.parameters()), handle.stats()["steps"]))
    return results


@pytest.mark.parametrize("method", SOME, ids=label)
def test_no_sync_accumulates_and_counts_one_step(ranks, method):
    (one, steps), (other, _) = ranks(2).run(accumulate, method)[0]
    assert steps == 1
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


class Branches(torch.nn.Module):
    """Two halves of which a forward pass uses one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = mlp(layers=2, seed=1), mlp(layers=2, seed=2)

    def forward(self, x, use):
        return self.a(x) if use == "a" else self.b(x)


def unused(rank, n, method):
    model = Branches()
    ddp = wrap(model, find_unused_parameters=True)
    handle = attach(ddp, method)
    optimizer, batches = sgd(ddp), data(rank)

    def use(branch):
        x, y = next(batches)
        optimizer.zero_grad()
        ((ddp(x, branch) - y) ** 2).mean().backward()
        optimizer.step()
        return handle.state_dict()["memory"]["residual"]

    use("a"), use("b")
    before = use("a")
    after = use("b")
    kept = all(torch.equal(before[k], after[k]) for k in before if k.startswith("a."))
    moved = any(not torch.equal(before[k], after[k]) for k in before if k.startswith("b."))
    grads_left_alone = model.a[0].weight.grad is None or not model.a[0].weight.grad.any()
    mixed = use("a" if rank == 0 else "b")
    rank_kept = all(torch.equal(mixed[k], after[k]) for k in mixed if k.startswith("b." if rank == 0 else "a."))
    return kept, moved, grads_left_alone, rank_kept, equal_on_all_ranks(model.parameters())


@pytest.mark.parametrize("method", [TOPK, NOMINATED], ids=label)
def test_an_unused_parameter_keeps_its_residual(ranks, method):
    assert ranks(2).run(unused, method) == [(True,) * 5] * 2


def several_dtypes():
    in_double, in_half = learner(layers=2, dtype=torch.float64), learner(layers=1, dtype=torch.bfloat16)
    return torch.nn.Sequential(
        learner(layers=2), Cast(torch.float64), in_double, Cast(torch.bfloat16), in_half, Cast(torch.float32)
    )


class Cast(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


@pytest.mark.parametrize("method", SOME, ids=label)
def test_several_dtypes_in_one_model(ranks, method):
    assert ranks(2).run(train, method, several_dtypes) == [(True, True, 15)] * 2


def uneven(rank, n, method):
    model = mlp()
    ddp = wrap(model)
    handle = attach(ddp, method)
    optimizer, batches = sgd(ddp), data(rank)
    with ddp.join():
        for _ in range(5 + 3 * rank):
            step(ddp, optimizer, next(batches))
    finite = bool(torch.isfinite(flat(model.parameters())).all())
    return equal_on_all_ranks(model.parameters()), finite, handle.stats()["steps"]


@pytest.mark.parametrize("method", [*SOME, Dense()], ids=lambda m: getattr(m, "selection", "dense"))
def test_join_with_uneven_inputs(ranks, method):
    """A rank that has joined stands in with zeros, so the last steps of the others are averaged over all."""
    for equal, finite, steps in ranks(3).run(uneven, method):
        assert equal and finite and steps == 11


def overflow(rank, n, method):
    """A GradScaler step whose gradient is inf on rank 1 alone, between ordinary ones."""
    model = mlp()
    ddp = wrap(model)
    optimizer = sgd(ddp)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    handle = attach(ddp, method, optimizer, grad_scaler=scaler)
    batches, moved, scales = data(rank), [], []
    residuals = []
    for i in range(6):
        x, y = next(batches)
        before = flat(model.parameters())
        optimizer.zero_grad()
        loss = ((ddp(x) - y) ** 2).mean()
        if i == 3 and rank == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(before, flat(model.parameters())))
        scales.append(scaler.get_scale())
        state = handle.state_dict()["memory"]
        residuals.append({k: torch.cat(list(v.values())) for k, v in state.items()})
    finite = bool(torch.isfinite(flat(model.parameters())).all())
    finite &= all(bool(torch.isfinite(t).all()) for r in residuals for t in r.values())
    undone = all(torch.allclose(residuals[2][k], residuals[3][k], rtol=1e-4, atol=1e-3) for k in residuals[2])
    return moved, scales, finite, undone, equal_on_all_ranks(model.parameters())


@pytest.mark.parametrize("method", ALL_METHODS, ids=label)
def test_a_step_that_overflows_is_skipped_everywhere_and_leaves_no_trace(ranks, method):
    for moved, scales, finite, undone, equal in ranks(2).run(overflow, method):
        assert moved == [True, True, True, False, True, True]
        assert scales == [1024] * 3 + [512] * 3
        assert finite and undone and equal


def one_bad_bucket(rank, n, method):
    """inf on rank 1 in the last layer's bucket only: what becomes of that bucket, and of the others."""
    runs = []
    for spoil in (False, True):
        model = mlp()
        ddp = wrap(model)
        optimizer, batches = sgd(ddp), data(rank)
        handle = attach(ddp, method, optimizer)
        for _ in range(3):
            step(ddp, optimizer, next(batches))
        before = handle.state_dict()["memory"]["residual"]
        if spoil and rank == 1:
            model[-2].weight.register_hook(lambda grad: grad * float("inf"))
        optimizer.zero_grad()
        x, y = next(batches)
        ((ddp(x) - y) ** 2).mean().backward()
        runs.append((before, handle.state_dict()["memory"]["residual"],
                     {name: p.grad.clone() for name, p in model.named_parameters()}))  # fmt: skip
    (before, good, good_grads), (_, mixed, mixed_grads) = runs
    spoilt = [name for name, grad in mixed_grads.items() if not torch.isfinite(grad).all()]
    undone = all(torch.allclose(mixed[name], before[name], rtol=1e-5, atol=1e-6) for name in spoilt)
    rest = [name for name in good if name not in spoilt]
    same = all(torch.equal(mixed[k], good[k]) and torch.equal(mixed_grads[k], good_grads[k]) for k in rest)
    return spoilt, len(rest), undone, same


@pytest.mark.parametrize("method", [TOPK, BlockSparse("nominated", density=0.1)], ids=label)
def test_one_bucket_that_overflows_leaves_the_others_alone(ranks, method):
    results = ranks(2).run(one_bad_bucket, method)
    for spoilt, rest, undone, same in results:
        assert spoilt == results[0][0] and "10.weight" in spoilt and rest >= 6
        assert undone and same


def copied(rank, n):
    """A deep copy of a DDP model with a hook says that it has lost it, trains as plain DDP, and can be attached."""
    ddp = wrap(mlp())
    optimizer, batches = sgd(ddp), data(rank)
    handle = attach(ddp, TOPK, optimizer)
    step(ddp, optimizer, next(batches))
    with logged() as said:
        twin = copy.deepcopy(ddp)
    plain = wrap(copy.deepcopy(ddp.module))
    batch = next(batches)
    step(twin, sgd(twin), batch)
    step(plain, sgd(plain), batch)
    as_plain = torch.equal(flat(twin.parameters()), flat(plain.parameters()))
    again = attach(twin, TOPK)
    step(twin, sgd(twin), next(batches))
    step(ddp, optimizer, next(batches))
    return said, as_plain, again.stats()["steps"], handle.stats()["steps"]


def test_a_copy_of_the_model_says_that_it_lost_its_hook(ranks):
    for said, as_plain, twin_steps, steps in ranks(2).run(copied):
        assert len(said) == 1 and "thinwire.attach" in said[0]
        assert as_plain and steps == 2
        assert twin_steps == 1


def rescaled(rank, n):
    """The same run at two scales, the second changing on the way, must keep the same unscaled residual."""
    finals = []
    for change in (False, True):
        model = mlp()
        ddp = wrap(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        handle = attach(ddp, TOPK, grad_scaler=scaler)
        optimizer, batches = sgd(ddp), data(rank)
        for i in range(6):
            x, y = next(batches)
            optimizer.zero_grad()
            scaler.scale(((ddp(x) - y) ** 2).mean()).backward()
            scaler.step(optimizer)
            scaler.update(512.0 if change and i == 2 else 1024.0 if not change else None)
        finals.append((flat(model.parameters()), flat(handle.state_dict()["memory"]["residual"].values())))
    (p, r), (q, s) = finals
    return torch.equal(p, q), torch.equal(r / 1024, s / 512)


def test_memory_follows_the_scale(ranks):
    assert ranks(2).run(rescaled) == [(True, True)] * 2


def zeros(rank, n, method):
    model = mlp()
    ddp = wrap(model)
    optimizer = sgd(ddp)
    attach(ddp, method, optimizer)
    before = flat(model.parameters())
    (0 * ddp(next(data(rank))[0])).sum().backward()
    first = flat(p.grad for p in model.parameters())
    optimizer.step()
    return bool((first == 0).all()) and torch.equal(before, flat(model.parameters()))


@pytest.mark.parametrize("method", ALL_METHODS, ids=label)
def test_gradients_that_are_all_zero(ranks, method):
    assert all(ranks(2).run(zeros, method))


def two_models(rank, n):
    alone, together = [], []
    for pair in (False, True):
        models = [mlp(seed=s) for s in (1, 2)]
        ddps = [wrap(m) for m in models]
        methods = [TOPK, BlockSparse(block_size=16)]
        optimizers = [sgd(d) for d in ddps]
        for ddp, method in zip(ddps, methods, strict=True):
            attach(ddp, method)
        streams = [data(rank, seed=s) for s in (1, 2)]
        order = [(0, 1)] * 5 if pair else [(0,)] * 5 + [(1,)] * 5
        for which in order:
            for i in which:
                step(ddps[i], optimizers[i], next(streams[i]))
        (together if pair else alone).extend(flat(m.parameters()) for m in models)
    return all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_two_models_in_one_process(ranks):
    assert all(ranks(2).run(two_models))


def rebuilt(rank, n):
    """DDP rearranges its buckets after the first backward pass; residuals must follow their parameters.

    It does not where it looks for unused parameters: that run tells what the others should give.
    """
    outcomes = []
    for options in ({"bucket_cap_mb": 0.01, "find_unused_parameters": True}, {"bucket_cap_mb": 0.01},
                    {"bucket_cap_mb": 25}):  # fmt: skip
        model = mlp()
        ddp = wrap(model, **options)
        handle = attach(ddp, NOMINATED)
        optimizer, batches, layouts = sgd(ddp), data(rank), []
        for _ in range(4):
            step(ddp, optimizer, next(batches))
            layouts.append(frozenset(handle._reducer.memory.residual._flats))
        outcomes.append((flat(model.parameters()), len(set(layouts))))
    (never, _), *others = outcomes
    return all(torch.equal(never, one) for one, _ in others), [changes for _, changes in outcomes]


def test_results_do_not_depend_on_buckets(ranks):
    for equal, layouts in ranks(3).run(rebuilt):
        assert equal
        assert layouts[0] == 1 and min(layouts[1:]) > 1, "the buckets changed where they should not, or the reverse"


def callbacks(rank, n, method):
    """Fails if a collective is started, or waited for, while a future's callback runs."""
    import threading

    inside, offences = threading.local(), []
    future_class = torch.futures.Future
    then, wait = future_class.then, future_class.wait

    def watched_then(self, callback):
        def run(future):
            inside.callback = True
            try:
                return callback(future)
            finally:
                inside.callback = False

        return then(self, run)

    def forbid(name, function):
        def call(*args, **kwargs):
            if getattr(inside, "callback", False):
                offences.append(name)
            return function(*args, **kwargs)

        return call

    names = [x for x in dir(dist) if x.startswith(("all_", "broadcast", "reduce", "send", "recv", "barrier", "gather"))]
    saved = {name: getattr(dist, name) for name in names}
    from thinwire.core import exchange

    gather = exchange._all_gather_single
    try:
        future_class.then, future_class.wait = watched_then, forbid("Future.wait", wait)
        exchange._all_gather_single = forbid("all_gather_single", gather)
        for name, function in saved.items():
            setattr(dist, name, forbid(name, function))
        model = mlp()
        ddp = wrap(model)
        optimizer, batches = sgd(ddp), data(rank)
        attach(ddp, method, optimizer)
        for _ in range(5):
            step(ddp, optimizer, next(batches))
    finally:
        future_class.then, future_class.wait, exchange._all_gather_single = then, wait, gather
        for name, function in saved.items():
            setattr(dist, name, function)
    return offences


@pytest.mark.parametrize("method", ALL_METHODS, ids=label)
def test_no_collective_inside_a_callback(ranks, method):
    assert ranks(2).run(callbacks, method) == [[], []]


def dead_rows(rank, n, method):
    """Rows of an embedding that no batch uses must not drift."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(64, 16), torch.nn.Linear(16, 16))
    before = model[0].weight[32:].detach().clone()
    ddp = wrap(model)
    attach(ddp, method)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(10):
        optimizer.zero_grad()
        ddp(torch.randint(0, 32, (8,), generator=generator)).square().mean().backward()
        optimizer.step()
    return torch.equal(before, model[0].weight[32:].detach())


@pytest.mark.parametrize("method", SOME, ids=label)
def test_dead_embedding_rows_stay(ranks, method):
    assert all(ranks(2).run(dead_rows, method))


def figures(rank, n, method):
    ddp = wrap(mlp())
    handle = attach(ddp, method)
    optimizer, batches = sgd(ddp), data(rank)
    for _ in range(5):
        step(ddp, optimizer, next(batches))
    return handle.stats()


def test_stats(ranks):
    """40 of the 160 blocks of a layer's weight travel, and 1 of the 4 of its bias; both ways in a ring."""
    for stats in ranks(4).run(figures, BlockSparse("shared", density=0.25, block_size=10, dense_below=0)):
        assert set(stats) == {
            "steps", "bytes_sent", "bytes_received", "dense_bytes", "compression", "encode_s", "exchange_s", "decode_s",
            "waited_s",
        }  # fmt: skip
        assert stats["steps"] == 5
        ring = lambda elements: 5 * 2 * 3 * elements / 4 * 4
        assert stats["dense_bytes"] == ring(6 * 1640)
        assert stats["bytes_sent"] == stats["bytes_received"] == ring(6 * (400 + 12))  # 10 are dealt as 12 to 4 owners
        assert stats["compression"] == 1640 / 412
        assert all(stats[k] > 0 for k in ("encode_s", "exchange_s", "decode_s", "waited_s"))


def blocks_that_arrived(parameter, block_size):
    """How many of a parameter's blocks the averaged gradient has something in."""
    blocks = torch.nn.functional.pad(parameter.grad.flatten(), (0, -parameter.numel() % block_size))
    return int(blocks.view(-1, block_size).any(1).sum())


def estimated(rank, n, methods, cap):
    """For each method what the last of some steps sent, what is estimated, by how much less nominated sends because
    ranks named the same block, and the number of buckets."""
    rows = []
    for method in methods:
        model = mlp()
        ddp = wrap(model, bucket_cap_mb=cap)
        optimizer, batches = sgd(ddp), data(rank)
        handle = attach(ddp, method, optimizer)
        last = max(2, method.warmup_steps + method.ramp_steps)  # DDP has its final buckets by then
        for _ in range(last):
            step(ddp, optimizer, next(batches))
        before, seen = handle.stats()["bytes_sent"], len({names for names, _ in handle._reducer._shapes})
        step(ddp, optimizer, next(batches))
        saved = 0
        if method.selection == "nominated":
            parameters = list(model.parameters())
            most = method.counts_at(last, n, [p.numel() for p in parameters])
            for parameter, count in zip(parameters, most):
                elements = lambda blocks: min(blocks * method.block_size, parameter.numel())
                of_owner = lambda blocks: -(-elements(blocks) // n)
                arrived = blocks_that_arrived(parameter, method.block_size)
                saved += 2 * (n - 1) * method.wire_dtype.itemsize * (of_owner(count) - of_owner(arrived))
        rows.append((handle.stats()["bytes_sent"] - before, thinwire.estimate(method, model, n), saved, seen))
    return rows


@pytest.mark.parametrize("cap", [25, SMALL_BUCKET_MB], ids=["one-bucket", "several-buckets"])
def test_estimate_is_what_is_sent(ranks, cap):
    """To the byte, but for what each message of 16-bit values has beside them, and for nominated's list of blocks,
    which is as long on every rank as on the one that names most in that bucket. Of fewer bits: test_wires.py."""
    methods = [method for method in ALL_METHODS if not isinstance(method.wire_dtype, str)]
    for of_rank in ranks(3).run(estimated, methods, cap):
        for method, (sent, told, saved, buckets) in zip(methods, of_rank, strict=True):
            beside = 0
            if method.wire_dtype.itemsize == 2:  # there and back: a float16 scale, and up to a whole word
                beside += buckets * 2 * 2 * (4 + 3)
            if method.selection == "nominated" and cap != 25:
                beside += buckets * 2 * 4
            assert 0 <= sent - (told["bytes_sent"] - saved) <= beside, label(method)


def all_named_apart(rank, n, method):
    """Every rank's heaviest blocks are light on the others, so that no block is named twice."""
    model = torch.nn.Linear(48, 100, bias=False)
    ddp = wrap(model)
    handle = attach(ddp, method)
    gradient = torch.rand(300, 16) + 10 * (torch.arange(300) % n == rank)[:, None]
    (ddp(torch.eye(48)).t() * gradient.view(100, 48)).sum().backward()
    return handle.stats()["bytes_sent"], thinwire.estimate(method, model, n, step=0)["bytes_sent"]


def test_nominated_sends_all_that_is_estimated_where_no_block_is_named_twice(ranks):
    for sent, told in ranks(3).run(all_named_apart, NOMINATED):
        assert sent == told


def local_experts(rank, n):
    """Parameters that DDP was told to ignore differ between ranks, and are nobody else's business."""
    model = torch.nn.ModuleDict({"common": mlp(layers=5), "expert": torch.nn.Linear(40 + rank, 40)})
    model.forward = lambda x: model["common"](x)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["expert.weight", "expert.bias"])
    ddp = wrap(model)
    handle = attach(ddp, TOPK)
    step(ddp, sgd(ddp), next(data(rank)))
    return sorted(handle.state_dict()["memory"]["residual"])


def test_parameters_that_ddp_ignores_are_left_alone(ranks):
    for names in ranks(2).run(local_experts):
        assert len(names) == 10 and not any("expert" in name for name in names)


def empty_parameter(rank, n):
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.zeros(0, dtype=torch.float64))
    model.b = torch.nn.Parameter(torch.zeros(64))
    model.forward = lambda x: model.a.sum() + (model.b * x).sum()
    ddp = wrap(model)
    attach(ddp, BlockSparse("topk", density=0.5, wire_dtype=torch.float16))
    ddp(torch.arange(64.0)).backward()
    return bool(torch.isfinite(model.b.grad).all()), model.a.grad.shape


def test_an_empty_parameter(ranks):
    assert ranks(2).run(empty_parameter) == [(True, (0,))] * 2


def shared_state(rank, n):
    models = [wrap(mlp(layers=5, seed=seed)) for seed in (1, 2)]
    state = thinwire.HookState(TOPK, models[0].module)
    for ddp in models:
        ddp.register_comm_hook(state, thinwire.hook)
    step(models[0], sgd(models[0]), next(data(rank)))
    try:
        step(models[1], sgd(models[1]), next(data(rank)))
    except RuntimeError as error:
        return str(error)


def test_one_hook_state_on_two_models_is_refused(ranks):
    for said in ranks(2).run(shared_state):
        assert "one for each model" in said


# ---- collectives that take their time, and DDP's default buckets ----


class Large(torch.nn.Module):
    """28 MB, which DDP's defaults put into three buckets: of 1 MB, of the 26 MB of one weight, and of the rest."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(40, 2560), torch.nn.Tanh(), torch.nn.Linear(2560, 2570), torch.nn.Tanh(),
                torch.nn.Linear(2570, 110), torch.nn.Tanh(), torch.nn.Linear(110, 40),
            )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def with_latency(rank, n, method, delays):
    """The parameters, whether they were equal on all ranks, buckets a step, and how many collectives were started,
    where each waits as long as this rank's delays say."""
    model = Large()
    ddp = DistributedDataParallel(model)  # with all defaults
    optimizer = sgd(ddp, lr=0.05)
    random = torch.Generator().manual_seed(rank)
    delay = lambda: time.sleep(delays[rank] * float(torch.rand((), generator=random)))
    with watched(delay) as found:
        handle = attach(ddp, method, optimizer)
        batches, buckets = data(rank), set()
        for _ in range(4):
            step(ddp, optimizer, next(batches))
            buckets |= {names for names, _ in handle._reducer._shapes}
        handle.finalize()
    late = handle.stats().get("late_buckets", 0)
    handle.close()
    return flat(model.parameters()), equal_on_all_ranks(model.parameters()), len(buckets), found.started, late


@pytest.mark.parametrize("method", [
    NOMINATED, TOPK, BlockSparse(block_size=16), BlockSparse("shared", density=0.1),
    Elastic(NOMINATED, beta=0.5, decide="agreed"),
], ids=lambda m: getattr(m, "selection", "elastic"))  # fmt: skip
def test_default_buckets_where_collectives_have_latency(ranks, method):
    """Late collectives change no bit, and there are no more of them."""
    (plain, *_, usual, _), *_ = ranks(3).run(with_latency, method, (0.0, 0.0, 0.0))
    for delays in ((0.0, 0.0, 0.04), (0.01, 0.02, 0.03)):  # of one rank, then of all
        results = ranks(3).run(with_latency, method, delays)
        for parameters, equal, buckets, started, late in results:
            assert torch.equal(parameters, plain) and equal
            assert buckets >= 3, "DDP was meant to make several buckets"
            assert late > 0 or not isinstance(method, Elastic)
            assert started == usual
