"""How programs end under each method; couriers that were closed; figures that several threads add to."""

import gc
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import attach, data, mlp, sgd, step, wrap
from thinwire import BlockSparse, Dense, Elastic
from thinwire.core import ends
from thinwire.core.courier import Courier
from thinwire.core.stats import Stats

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from ends.run import Server, outcome  # noqa: E402

CPU = torch.device("cpu")
WAYS = ("finalize, barrier, destroy", "finalize, destroy", "barrier, destroy", "nothing", "exception", "SIGTERM")


# ---- the interpreter's end ----


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("ends") / "log") as server:
        yield server


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["nominated", "Elastic", "DivideAndShuffle"])
def test_programs_end_by_themselves(server, method, way):
    statuses = server.end(method, way, ranks=2)
    assert {outcome(way, status) for status in statuses} == {"by itself"}, statuses


@pytest.mark.parametrize("method", ["independent", "Elastic"])
def test_what_arrives_late_does_not_abort_the_end(server, method):
    """What rank 0 leaves under way arrives while its interpreter ends, which takes long enough to be hit by that."""
    statuses = server.end(method, "exception in backward", ranks=2, linger=0.5)
    assert statuses == [1, 1]


def test_ctrl_c_with_buckets_under_way(server):
    statuses = server.end("independent", "Ctrl-C", ranks=2, linger=0.5)
    assert {outcome("Ctrl-C", status) for status in statuses} == {"by itself"}, statuses


# ---- who holds a process group ----


def held_by_callbacks(rank, n):
    """A callback that is done holds nothing, and a destroyed group goes when another is used."""
    first, second = dist.new_group(), dist.new_group()
    model = mlp()
    ddp, optimizer, batches = wrap(model, process_group=first), sgd(model), data(rank)
    handle = attach(ddp, BlockSparse(block_size=16))
    for _ in range(3):
        step(ddp, optimizer, next(batches))
    busy = [callback for callback in ends._under_way if callback.group is first]
    kept = first in ends._kept
    handle.close()
    del handle, ddp
    dist.destroy_process_group(first)
    still = first in ends._kept
    ends.keep(second)
    gone = first not in ends._kept
    dist.destroy_process_group(second)
    ends.let_go(second)
    return busy, kept, still, gone, second not in ends._kept


def test_groups_are_held_while_they_are_used(ranks):
    assert ranks(2).run(held_by_callbacks) == [([], True, True, True, True)] * 2


def attach_and_close(rank, n):
    """The threads of the process, after Elastic has come and gone a few times."""
    counts = []
    for _ in range(4):
        model = mlp()
        ddp, optimizer, batches = wrap(model), sgd(model), data(rank)
        handle = attach(ddp, Elastic(Dense(), beta=0.5), optimizer)
        for _ in range(3):
            step(ddp, optimizer, next(batches))
        handle.close()
        del handle, ddp, optimizer
        gc.collect()
        last = time.monotonic() + 5
        while counts and len(list(Path("/proc/self/task").iterdir())) > counts[0] and time.monotonic() < last:
            time.sleep(0.01)
        counts.append(len(list(Path("/proc/self/task").iterdir())))
    return counts


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_close_leaves_no_thread_behind(ranks):
    for counts in ranks(2).run(attach_and_close):
        assert max(counts) == counts[0], counts


def test_a_callback_lets_go_of_what_it_holds(ranks):
    assert ranks(2).run(callback_lets_go) == [True, True]


def callback_lets_go(rank, n):
    class Thing:
        pass

    thing = Thing()
    there = weakref.ref(thing)
    future = torch.futures.Future()
    callback = ends.Callback(dist.group.WORLD, lambda future, thing=thing: thing and 1)
    del thing
    assert there() is not None and callback in ends._under_way
    result = future.then(callback)
    future.set_result(None)
    assert result.wait() == 1
    return there() is None and callback.group is None and callback not in ends._under_way


# ---- couriers ----


def test_a_closed_courier_is_waited_for_and_takes_no_job():
    done = []
    courier = Courier("test", CPU, lambda error: None)
    courier.do(lambda: (time.sleep(0.2), done.append(1)))
    courier.close()
    courier.wait(seconds=30)
    assert done == [1]
    begin = time.monotonic()
    courier.wait(seconds=30)
    assert time.monotonic() - begin < 10
    with pytest.raises(RuntimeError, match="closed"):
        courier.do(lambda: done.append(2))
    assert done == [1]


def test_a_failed_courier_raises_from_wait_after_close():
    courier = Courier("test", CPU, lambda error: None)
    courier.do(lambda: 1 / 0)
    courier.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            courier.wait(seconds=30)


# ---- figures ----


def test_threads_that_add_to_the_same_figures_lose_nothing():
    stats, times = Stats(), 20_000
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=add, args=(stats, times)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    n = 4 * times
    assert stats == Stats(bytes_sent=3 * n, bytes_received=3 * n, exchange_s=1.0 * n, decode_s=2.0 * n)


def add(stats, times):
    for _ in range(times):
        stats.add(exchange_s=1.0, decode_s=2.0)
        stats.count_bytes(3)
