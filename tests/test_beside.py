"""What runs beside the backward pass: nothing in the hook waits for it, and it ends, fails and is dropped in order."""

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import thinwire
import torch
import torch.distributed as dist
from models import SMALL_BUCKET_MB, attach, data, equal_on_all_ranks, flat, label, mlp, sgd, step, watched, wrap
from thinwire import BlockSparse, Dense, HookState
from thinwire.core.beside import Waves
from thinwire.core.channel import Channel
from thinwire.core.exchange import GroupLinks
from thinwire.core.stats import Stats

THREAD = "thinwire"  # of couriers


def sparse(selection, wire_dtype=torch.float32, memory="error_feedback", density=0.1):
    density = None if selection in ("independent", "permuted") else density
    return BlockSparse(selection, density=density, memory=memory, block_size=16, dense_below=20, wire_dtype=wire_dtype)


def name_of(method):
    return label(method) if isinstance(method, BlockSparse) else f"dense-{method.memory}-{method.wire_dtype}"


NOMINATED = sparse("nominated", "int4")
SELECTIONS = ("independent", "permuted", "shared", "topk", "nominated")
WIRES = (torch.float32, torch.bfloat16, torch.float16, "int8", "int4", "int2")
EVERY = [sparse(selection, wire) for selection in SELECTIONS for wire in WIRES] + [
    *(sparse(selection, wire, "control_variate") for selection in SELECTIONS[:3] for wire in (torch.float32, "int4")),
    Dense(exact=True), Dense(torch.bfloat16), Dense("int4", "error_feedback"),
]  # fmt: skip
SOME = [sparse(selection, wire) for selection, wire in zip(SELECTIONS, ("int8", torch.float16, "int2", "int4", "int4"))]


@contextlib.contextmanager
def before_each_verb(do):
    """Call do(verb) in the courier's thread, before each thing that is asked of the links."""
    kept = {verb: getattr(GroupLinks, verb) for verb in ("ask", "gather", "swap")}

    def first(verb):
        def call(links, tensor):
            if not getattr(_inside, "verb", None):  # one may use another
                do(verb)
            outer, _inside.verb = getattr(_inside, "verb", None), verb
            try:
                return kept[verb](links, tensor)
            finally:
                _inside.verb = outer

        return call

    for verb in kept:
        setattr(GroupLinks, verb, first(verb))
    try:
        yield
    finally:
        for verb, function in kept.items():
            setattr(GroupLinks, verb, function)


_inside = threading.local()


@contextlib.contextmanager
def over_when_the_last_hook_has_returned():
    """An event, of each backward pass anew."""
    over, reduce = threading.Event(), HookState.reduce

    def watching(state, bucket):
        if bucket.index() == 0:
            over.clear()
        future = reduce(state, bucket)
        if bucket.is_last():
            over.set()
        return future

    HookState.reduce = watching
    try:
        yield over
    finally:
        HookState.reduce = reduce


def begin(method, cap=SMALL_BUCKET_MB, model=None, **options):
    model = mlp() if model is None else model
    ddp = wrap(model, bucket_cap_mb=cap, **options)
    optimizer = sgd(ddp)
    return model, ddp, optimizer, attach(ddp, method, optimizer)


# ---- nothing waits in the hook ----


def held_back(rank, n, methods):
    """Collectives wait until the last hook of the pass has returned; what trains under that, and what trains freely."""
    outcomes = []
    for method in methods:
        found, calls = [], []

        def hold(verb):
            calls.append(verb)
            assert over.wait(30), f"{verb}: the hook's body waits for it"

        for holding in (True, False):
            model, ddp, optimizer, _ = begin(method)
            batches = data(rank)
            with over_when_the_last_hook_has_returned() as over, before_each_verb(hold if holding else lambda verb: 0):
                for _ in range(3):
                    step(ddp, optimizer, next(batches))
            found.append(flat(model.parameters()))
        outcomes.append((name_of(method), torch.equal(*found), len(calls)))
    return outcomes


@pytest.mark.parametrize("methods", [SOME, pytest.param(EVERY, marks=pytest.mark.full)], ids=len)
def test_the_hooks_body_waits_for_no_collective(ranks, methods):
    for outcomes in ranks(2).run(held_back, methods, seconds=600):
        for name, same, calls in outcomes:
            assert same and calls >= 3, name


# ---- how many collectives a step takes ----


def collectives(rank, n, methods, caps):
    """Of each method and each way to make buckets: how many buckets, and collectives in each of some steps."""
    outcomes = []
    for method in methods:
        found = []
        for cap in caps:
            model, ddp, optimizer, handle = begin(method, cap)
            batches, buckets, reduce, counts = data(rank), [], handle.reduce, []
            handle.reduce = lambda bucket: (buckets.append(bucket.index()), reduce(bucket))[1]
            for _ in range(4):
                with watched() as seen:
                    step(ddp, optimizer, next(batches))
                counts.append(seen.started)
            found.append((1 + buckets[-1], counts[2:]))
        outcomes.append((name_of(method), found))
    return outcomes


ROUNDS = {"independent": 1, "permuted": 1, "topk": 1, "shared": 2, "nominated": 3}


@pytest.mark.parametrize("methods", [[*SOME, Dense(exact=True)], pytest.param(EVERY, marks=pytest.mark.full)], ids=len)
def test_a_steps_collectives_do_not_grow_with_its_buckets(ranks, methods):
    """One wave's for one bucket, two waves' for any more; in the same number on every rank."""
    first, *others = ranks(3).run(collectives, methods, (25, 0.02, SMALL_BUCKET_MB))
    assert all(other == first for other in others)
    for method, (name, ((one, alone), (some, few), (many, most))) in zip(methods, first, strict=True):
        assert one == 1 < some < many
        rounds = ROUNDS[getattr(method, "selection", "shared")]
        assert alone == [rounds] * 2 and few == most == [2 * rounds] * 2, name


def cuts(sizes):
    """Which of these end a wave, and how much is left for the last."""
    waves, of = Waves(), sum(sizes)
    return [waves.ends(size, of) for size in sizes]


@pytest.mark.parametrize(("sizes", "ends"), [
    ([10], [False]), ([4, 6], [False, False]), ([5, 5], [True, False]), ([6, 4], [True, False]),
    ([1, 1, 1, 1], [False, True, False, False]), ([1, 1, 8], [False, False, False]),
    ([8, 1, 1], [True, False, False]), ([0, 0, 3, 0], [False, False, False, False]), ([3, 0, 3], [True, False, False]),
    ([1] * 7, [False, False, False, True, False, False, False]), ([0], [False]),
], ids=str)  # fmt: skip
def test_waves_end_where_half_is_there_and_with_the_pass(sizes, ends):
    assert cuts(sizes) == ends


def test_waves_are_two_at_most_however_many_elements_come():
    """A pass that brings less than it may ends with the last wave alone; one bucket is never two waves."""
    waves = Waves()
    assert not any(waves.ends(1, 100) for _ in range(49)) and waves.ends(1, 100)
    assert not any(waves.ends(1, 100) for _ in range(49))


# ---- an exchange that fails ----


class Torn(Exception):
    pass


def failing(rank, n, methods, verb_that_fails):
    """What backward raises when the exchange fails, then and in the step after, and how long that takes."""
    outcomes = []
    for method in methods:
        model, ddp, optimizer, handle = begin(method)
        batches, said, torn = data(rank), [], []

        def fail(verb):
            if torn or verb == verb_that_fails:
                torn.append(verb)
                raise Torn(f"{verb} is torn")

        step(ddp, optimizer, next(batches))
        before = time.monotonic()
        with before_each_verb(fail):
            for _ in range(2):
                try:
                    step(ddp, optimizer, next(batches))
                    said.append("nothing")
                except RuntimeError as error:
                    said.append(str(error))
        seconds = time.monotonic() - before
        handle.close()
        outcomes.append((name_of(method), said, seconds, len(torn)))
    return outcomes


@pytest.mark.parametrize("verb", ["ask", "swap", "gather"])
def test_an_exchange_that_fails_is_raised_out_of_backward(ranks, verb):
    methods = {"ask": [NOMINATED], "swap": [NOMINATED, Dense(torch.bfloat16)],
               "gather": [NOMINATED, sparse("topk"), sparse("independent", "int4")]}[verb]  # fmt: skip
    for outcomes in ranks(2).run(failing, methods, verb, seconds=120):
        for name, said, seconds, torn in outcomes:
            assert torn == 1 and seconds < 20, (name, torn, seconds)
            assert "in the background failed" in said[0] and f"{verb} is torn" in said[0], said
            assert said[1] != "nothing"  # DDP itself may say first that the pass before has not ended


# ---- how long the backward pass waited ----


def waits(rank, n, method, held_s):
    """Seconds that stats() says a step waited, with collectives that take so long once the hooks have returned."""
    model, ddp, optimizer, handle = begin(method, cap=25)
    batches = data(rank)

    def hold(verb):
        assert over.wait(30)
        time.sleep(held_s)

    step(ddp, optimizer, next(batches))
    before = handle.stats()["waited_s"]
    with over_when_the_last_hook_has_returned() as over, before_each_verb(hold):
        for _ in range(3):
            step(ddp, optimizer, next(batches))
    return (handle.stats()["waited_s"] - before) / 3


def test_what_the_backward_pass_waited_for_is_counted(ranks):
    for method, collectives in ((sparse("independent"), 1), (NOMINATED, 3)):
        assert min(ranks(2).run(waits, method, 0.05)) >= 0.04 * collectives
    assert ranks(1).run(waits, NOMINATED, 0.05) == [0.0]


# ---- threads and groups ----


def couriers():
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def native_threads():
    return len(os.listdir("/proc/self/task"))


def settled(there, seconds=20.0):
    """Whether nothing of it is there any more, soon."""
    end = time.monotonic() + seconds
    while there():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def comes_and_goes(rank, n, method):
    """Couriers and threads after attaching and closing some times, and whether each group was destroyed."""
    gc.collect()  # handles that were never closed
    outcomes, threads = [], []
    batches = data(rank)
    for _ in range(5):
        model, ddp, optimizer, handle = begin(method)
        step(ddp, optimizer, next(batches))
        group, at_work = handle._beside._carrier.group, len(couriers())
        handle.close()
        ended = settled(couriers)
        try:
            dist.get_backend(group)
            destroyed = False
        except (ValueError, RuntimeError):
            destroyed = True
        step(ddp, optimizer, next(batches))  # as without a hook
        outcomes.append((at_work, ended, destroyed))
        del group, handle, ddp, model, optimizer
        gc.collect()
        settled(lambda: threads and native_threads() > threads[0], 5.0)
        threads.append(native_threads())
    return outcomes, threads


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_close_ends_the_thread_and_its_group(ranks):
    for outcomes, threads in ranks(2).run(comes_and_goes, NOMINATED):
        assert outcomes == [(1, True, True)] * 5
        assert max(threads) == threads[0], threads


def attached_again(rank, n):
    """One model under one method after the other."""
    model = mlp()
    ddp = wrap(model)
    optimizer, batches, most = sgd(ddp), data(rank), 0
    gc.collect()
    for method in (NOMINATED, sparse("topk", "int8"), Dense("int2", "error_feedback"), NOMINATED):
        handle = attach(ddp, method, optimizer)
        for _ in range(2):
            step(ddp, optimizer, next(batches))
        equal = equal_on_all_ranks(model.parameters())
        handle.close()
        assert settled(couriers)
        most = max(most, handle.stats()["steps"])
    return equal, most


def test_attaching_again_works(ranks):
    assert ranks(2).run(attached_again) == [(True, 2)] * 2


def dropped(rank, n, how):
    """How many couriers there are while a handle is there and when it is not: a closed one without the garbage
    collector. And whether anything holds what was beside."""
    gc.collect()
    model, ddp, optimizer, handle = begin(NOMINATED)
    batches = data(rank)
    for _ in range(2):
        step(ddp, optimizer, next(batches))
    there = weakref.ref(handle._beside)
    at_work = len(couriers())
    gc.disable()
    try:
        if how == "closed":
            handle.close()
        del handle, ddp, model, optimizer
        if how == "dropped":
            gc.collect()
        settled(couriers, 5.0 if how == "closed" else 0.1)
        return at_work, len(couriers()), there() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_the_thread_ends_with_the_last_handle_that_is_closed(ranks, how):
    """One that is dropped leaves it, and its group, to the next: ranks do not collect garbage at the same time."""
    assert ranks(2).run(dropped, how) == [(1, 0 if how == "closed" else 1, True)] * 2


# ---- a pass that broke off ----


class Breaking(torch.autograd.Function):
    """Identity, whose backward raises when it is told to."""

    tells = False

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        if Breaking.tells:
            raise Torn("in the middle of backward")
        return gradient


class Breakable(torch.nn.Module):
    def __init__(self, after):
        super().__init__()
        self.body, self.after = mlp(layers=8), 2 * after

    def forward(self, x):
        return self.body[self.after :](Breaking.apply(self.body[: self.after](x)))


def breaks_off(ddp, optimizer, handle, batch, said, hold):
    """A pass that breaks off, and is cleared; how many buckets it brought. said: whether the loop says so too. hold:
    what it had begun to exchange arrives only then."""
    cleared, numbers, reduce = threading.Event(), [], handle.reduce
    handle.reduce = lambda bucket: (numbers.append(bucket.index()), reduce(bucket))[1]
    Breaking.tells = True
    try:
        with before_each_verb(lambda verb: hold and cleared.wait(30)):
            with pytest.raises(Torn):
                step(ddp, optimizer, batch)
            assert hold or settled(lambda: handle._beside._travelling)
            if said:
                handle.skip_step()
            optimizer.zero_grad()
            cleared.set()
            handle.state_dict()
            assert settled(lambda: handle._beside._travelling)
    finally:
        Breaking.tells = False
    return len(numbers)


def broken_off(rank, n, methods, said, after, hold):
    """Of each method, whether a run in which a pass broke off, which DDP does not forgive, goes on in another DDP as
    one without that pass; and how many buckets it had brought."""
    outcomes = []
    for method in methods:
        found, seen = [], 0
        for breaks in (True, False):
            model, ddp, optimizer, handle = begin(method, model=Breakable(after))
            batches = data(rank)
            for _ in range(2):
                step(ddp, optimizer, next(batches))
            batch = next(batches)
            seen += breaks_off(ddp, optimizer, handle, batch, said, hold) if breaks else 0
            state = handle.state_dict()
            handle.close()
            state["step"] = 3
            ddp = wrap(model)
            handle = attach(ddp, method, optimizer)
            handle.load_state_dict(state)
            for _ in range(3):
                step(ddp, optimizer, next(batches))
            held = [tensor for one in (state, handle.state_dict()) for kind in one["memory"].values()
                    for tensor in kind.values()]  # fmt: skip
            found.append([flat(model.parameters()), *held])
        outcomes.append((name_of(method), all(torch.equal(a, b) for a, b in zip(*found, strict=True)), seen))
    return outcomes


BREAKABLE = [
    sparse("shared", "int4", "control_variate"), Dense("int4", "error_feedback"),
    BlockSparse("nominated", density=0.1, block_size=16, dense_below=20, momentum=0.9, wire_dtype="int8"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "after", "hold"), [
    (True, 2, False), (True, 2, True), (True, 6, False), (False, 2, True),
    *(pytest.param(*one, marks=pytest.mark.full) for one in ((True, 6, True), (False, 2, False), (False, 6, False))),
], ids=lambda one: None)  # fmt: skip
def test_a_pass_that_broke_off_leaves_nothing(ranks, said, after, hold):
    """Late: after most of the buckets, so that a wave has been sent."""
    for outcomes in ranks(2).run(broken_off, BREAKABLE, said, after, hold):
        for name, same, seen in outcomes:
            assert same, name
            assert seen > (4 if after == 2 else 0)


# ---- one rank that goes all the way ----

ALONE = """
import sys, torch, torch.distributed as dist
import test_beside as tests
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
torch.set_num_threads(1)
for method in tests.EVERY:
    tests.goes_all_the_way(method)
tests.asks_at_odd_places()
dist.destroy_process_group()
"""


def goes_all_the_way(method):
    """What is sent and what is kept are what there was, and something has been rounded off or left out."""
    model, ddp, optimizer, handle = begin(method)
    batches, name = data(0), name_of(method)
    before = [torch.zeros(p.numel(), dtype=torch.float64) for p in model.parameters()]
    for _ in range(3):
        x, y = next(batches)
        mine = torch.autograd.grad(((model(x) - y) ** 2).mean(), list(model.parameters()))
        optimizer.zero_grad()
        ((ddp(x) - y) ** 2).mean().backward()
        memory = handle.state_dict()["memory"]
        sent = flat(p.grad for p in model.parameters())
        assert bool(torch.isfinite(sent).all()), name
        if "residual" in memory:
            kept = [memory["residual"][name].double() for name, _ in model.named_parameters()]
            assert (sent + torch.cat(kept) - torch.cat(before) - flat(mine)).abs().max() < 1e-6, name
            before = kept
        optimizer.step()
    stats = handle.stats()
    assert stats["bytes_sent"] == 0 and stats["steps"] == 3 and stats["decode_s"] > 0, name
    assert "residual" not in memory or any(bool(one.any()) for one in kept) or method.wire_dtype == torch.float32, name
    handle.close()


class Asks:
    """Asks only: what each of several flats has to ask, and what it was answered."""

    def __init__(self):
        self.answered = []

    def take_in(self, flat, *_):
        return SimpleNamespace(asked=flat, choice=SimpleNamespace(slots=SimpleNamespace(numel=0)))

    def pack(self, encoded, answers, to_owners):
        self.answered.append((encoded.asked, answers))


def asks_at_odd_places():
    """Integers of several widths travel as bytes, one after another: not all begin where their width allows a view."""
    reducer = Asks()
    channel = Channel(GroupLinks(dist.group.WORLD), reducer, Stats())
    dtypes = (torch.int16, torch.int32, torch.int16, torch.int64, torch.uint8, torch.int32)
    flats = [torch.arange(3 + i % 2, dtype=dtype) + 9 for i, dtype in enumerate(dtypes)]
    channel.carry([channel.encode(one, (), (), 0) for one in flats])
    assert len(reducer.answered) == len(flats)
    for asked, answers in reducer.answered:
        assert answers.dtype == asked.dtype and answers.tolist() == [asked.tolist()]


def test_one_rank_goes_all_the_way_where_it_is_told_to(tmp_path):
    here = Path(__file__).parent
    env = os.environ | {"THINWIRE_EXCHANGE_ALONE": "1", "PYTHONPATH": os.pathsep.join([str(here), _import_root()])}
    done = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path / "store")], env=env, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def _import_root():
    return str(Path(thinwire.__file__).parents[1])
