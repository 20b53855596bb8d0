"""Horovod's ranks as threads of one process that take turns, for grids that would wait for real Horovod all day.

What Python there is of Horovod is its own, the DistributedOptimizer above all; only what that asks of its core is
simulated. A rank runs until it needs what another has yet to send, so no two ever run at once, and what a rank leaves
under way is added up when the last one has sent it. Who goes on is drawn, the same way in every run.
"""

import contextlib
import functools
import random
import threading
import traceback

import pytest
import torch

try:
    import horovod.common.process_sets as process_sets
    import horovod.torch as hvd
    from horovod.torch import functions, optimizer
except ImportError:
    hvd = None


class Stuck(AssertionError):
    """Every rank waits for something that no rank is going to send."""


class World:
    """n ranks. ``run(function)``, once, calls it on all of them and returns each one's traceback, or "" for none.

    sets: the ranks of the process sets that ``hvd.init`` would have been given; ``process_sets`` has them.
    """

    def __init__(self, n: int, sets=()):
        self.n = n
        self.rank: int | None = None  # whose turn it is
        self.members = [tuple(range(n)), *map(tuple, sets)]  # of each process set, by its id
        self.process_sets = []
        for number, ranks in enumerate(sets, 1):
            self.process_sets.append(hvd.ProcessSet(list(ranks)))
            self.process_sets[-1].process_set_id = number
        self._turn = threading.Condition()
        self._random = random.Random(n)
        self._needs = dict.fromkeys(range(n), lambda: True)  # what each rank that has not ended waits for
        self._stuck = False
        self._numbers: list[dict] = [{} for _ in range(n)]
        self._operations: dict[tuple, _Operation] = {}

    def run(self, function) -> list[str]:
        errors = [""] * self.n

        def serve(rank):
            try:
                self._wait(rank, lambda: True)
                function()
            except BaseException:
                errors[rank] = traceback.format_exc()
            finally:
                with self._turn:
                    del self._needs[rank]
                    self._pass_on()

        threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(self.n)]
        with _in_the_place_of_horovods(self):
            for thread in threads:
                thread.start()
            with self._turn:
                self._pass_on()
            for thread in threads:
                thread.join()
        return errors

    def _wait(self, rank, done):
        """Until it is this rank's turn and ``done()``."""
        with self._turn:
            if self.rank == rank:
                if done():
                    return
                self._needs[rank] = done
                self._pass_on()
            self._turn.wait_for(lambda: self.rank == rank)
            if self._stuck and not done():
                raise Stuck(f"rank {rank} waits for what does not come; so do all of {sorted(self._needs)}")

    def _pass_on(self):
        ready = [rank for rank in sorted(self._needs) if self._needs[rank]()]
        self._stuck = bool(self._needs) and not ready
        self.rank = self._random.choice(ready or sorted(self._needs) or [None])
        self._turn.notify_all()

    # ---- what Horovod's core does ----

    def start(self, kind, tensors, outputs, name, process_set, combine):
        """A handle. combine(rows): what each output gets of the rows of that tensor, one a rank of the process set."""
        rank, members = self.rank, self.members[process_set.process_set_id]
        assert rank in members, f"rank {rank} is not in the process set of {members}"
        base = (kind, members, name)
        number = self._numbers[rank][base] = self._numbers[rank].get(base, -1) + 1
        before = self._operations.get((*base, number - 1))
        assert name is None or before is None or before.done(), f"{name} is under way twice"
        operation = self._operations.setdefault((*base, number), _Operation(members, combine))
        operation.put(rank, tensors, outputs)
        return operation, rank, (*base, number)

    def synchronize(self, handle):
        operation, rank, key = handle
        self._wait(rank, operation.done)
        results = operation.results(rank)
        if operation.all_have_it():
            self._operations.pop(key, None)
        return results


class _Operation:
    """A collective: what each rank gave, and from when the last one has, what comes of it."""

    def __init__(self, members, combine):
        self._members, self._combine = members, combine
        self._given, self._results, self._error = {}, None, None
        self._left = set(members)

    def put(self, rank, tensors, outputs):
        self._given[rank] = (tensors, outputs)
        if len(self._given) < len(self._members):
            return
        try:
            rows = zip(*(self._given[rank][0] for rank in self._members), strict=True)
            self._results = [self._combine([row.detach() for row in some]) for some in rows]
        except (RuntimeError, ValueError) as error:
            self._error = error

    def done(self):
        return len(self._given) == len(self._members)

    def all_have_it(self):
        return not self._left

    def results(self, rank):
        self._left.discard(rank)
        if self._error is not None:
            raise RuntimeError(f"what the ranks sent does not fit together: {self._error}")
        outputs = self._given[rank][1]
        if outputs is None:
            return [result.clone() for result in self._results]
        for output, result in zip(outputs, self._results, strict=True):
            output.detach().copy_(result)
        return list(outputs)


def _added(rows, op, before, after):
    if len({(row.shape, row.dtype) for row in rows}) != 1:
        raise ValueError(f"shapes and dtypes {[(tuple(row.shape), row.dtype) for row in rows]}")
    total = rows[0] * before
    for row in rows[1:]:
        total = total + row * before
    return total * (after / len(rows) if op == hvd.Average else after)


def _core(world):
    """The functions of Horovod's that reach its core, by name."""

    def adding(in_place, grouped, tensors, average=None, name=None, op=None, prescale_factor=1.0,
               postscale_factor=1.0, process_set=hvd.global_process_set):  # fmt: skip
        tensors = list(tensors) if grouped else [tensors]
        combine = functools.partial(_added, op=hvd.Average if op is None else op, before=prescale_factor,
                                    after=postscale_factor)  # fmt: skip
        return (world.start("allreduce", tensors, tensors if in_place else None, name, process_set, combine), grouped)

    def synchronize(handle):
        handle, grouped = handle
        results = world.synchronize(handle)
        return results if grouped else results[0]

    def allreduce(tensor, **options):
        return synchronize(adding(False, False, tensor, **options))

    def allgather(tensor, name=None, process_set=hvd.global_process_set):
        return world.synchronize(world.start("allgather", [tensor], None, name, process_set, torch.cat))[0]

    def alltoall(tensor, name=None, process_set=hvd.global_process_set):
        combine = lambda rows: torch.stack([row.unflatten(0, (len(rows), -1)) for row in rows], 1)
        pieces = world.synchronize(world.start("alltoall", [tensor], None, name, process_set, combine))[0]
        return pieces[process_set.rank()].flatten(0, 1)

    def broadcast_async_(tensor, root_rank, name=None, process_set=hvd.global_process_set):
        combine = lambda rows: rows[root_rank]
        return (world.start("broadcast", [tensor], [tensor], name, process_set, combine), False)

    def broadcast_(tensor, root_rank, name=None, process_set=hvd.global_process_set):
        return synchronize(broadcast_async_(tensor, root_rank, name, process_set))

    return {
        "rank": lambda: world.rank, "size": lambda: world.n, "synchronize": synchronize, "allreduce": allreduce,
        "allreduce_async": functools.partial(adding, False, False),
        "allreduce_async_": functools.partial(adding, True, False),
        "grouped_allreduce_async_": functools.partial(adding, True, True),
        "allgather": allgather, "alltoall": alltoall, "broadcast_async_": broadcast_async_, "broadcast_": broadcast_,
    }  # fmt: skip


class _Basics:
    """What process sets ask Horovod's core."""

    def __init__(self, world):
        self._world = world
        self.rank = lambda: world.rank

    def _process_set_size(self, number):
        return len(self._world.members[number])

    def _process_set_rank(self, number):
        return self._world.members[number].index(self._world.rank)


@contextlib.contextmanager
def _in_the_place_of_horovods(world):
    with pytest.MonkeyPatch.context() as patch:
        for name, function in _core(world).items():
            for module in (hvd, functions, optimizer):
                if hasattr(module, name):
                    patch.setattr(module, name, function)
        patch.setattr(process_sets, "_basics", _Basics(world))
        patch.setattr(hvd.global_process_set, "ranks", list(range(world.n)))
        yield
