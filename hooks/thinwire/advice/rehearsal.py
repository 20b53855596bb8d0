"""What a communication hook does, without a network: run on this rank alone, it tells its work and its collectives.

:class:`Echo` is a process group whose collectives are there at once: what is gathered or exchanged is what would have
come had every rank sent the same, and of an all-reduce what this rank gave comes back, once. A hook that is run over
it does all of its own work, encoding and decoding and what its exchange adds up, and leaves a
:class:`thinwire.advice.cost.Script` behind: seconds of its own, and what it started and waited for between them.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from thinwire.advice.cost import Collective, Local, Script, Start, Wait
from thinwire.core.exchange import GroupLinks, gather_objects
from thinwire.state import agree

# hook(bucket) of one method: gives the future of the averaged bucket.
Hook = Callable[["Bucket"], torch.futures.Future]


class Refused(ValueError):
    """What went wrong on some rank, raised on all of them."""


def together(gather: Callable[[object], list], run: Callable[[], object]):
    """Run something on every rank; where it raises on one, all raise Refused. Of collectives it may use
    :func:`gathered` alone, or some would wait there for the rank that raised."""
    result = failure = None
    try:
        result = run()
    except Exception as error:  # whatever a user's function raises
        failure, inner = error, error
        while inner is not None:
            if isinstance(inner, Refused):  # the others know. torch.distributed may put an error of its own around it
                raise inner from None
            inner = inner.__context__

    def check():
        if failure is not None:
            raise ValueError(f"advise: {type(failure).__name__}: {failure}")
        return {}

    try:
        agree.check_together(gather, check)
    except ValueError as error:
        raise Refused(str(error)) from failure
    return result


def gathered(gather: Callable[[object], list], thing: object) -> list:
    """What every rank gives, on a way that all go :func:`together`: one that raised has its refusal in its place."""
    try:
        return agree.check_together(gather, dict, thing)
    except ValueError as error:
        raise Refused(str(error)) from None


class Bucket:
    """A DDP bucket as hooks see it, that no DDP has made: parameters, and a flat buffer with their gradients.

    of: elements of all buckets together; by default this is the only one.
    """

    def __init__(self, names: tuple[str, ...], shapes: Sequence[torch.Size], index: int, last: bool,
                 flat: torch.Tensor, of: int | None = None):  # fmt: skip
        self.names, self.shapes = names, tuple(shapes)
        self.of = flat.numel() if of is None else of
        self.numels = tuple(shape.numel() for shape in shapes)
        self._index, self._last, self._flat = index, last, flat

    def index(self) -> int:
        return self._index

    def is_last(self) -> bool:
        return self._last

    def buffer(self) -> torch.Tensor:
        return self._flat

    def set_buffer(self, flat: torch.Tensor) -> None:
        self._flat = flat

    def gradients(self) -> list[torch.Tensor]:
        return [part.view(shape) for part, shape in zip(self._flat.split(self.numels), self.shapes)]


class Echo(dist.ProcessGroup):
    """A process group of ``size`` ranks that only this rank knows of; see above.

    real: the group whose ranks rehearse together. What they must know of each other before they choose is gathered
    there (:class:`EchoLinks`): nominations, on whose union the rest of the work depends. The clock stands still
    meanwhile.
    """

    asking = False

    def __init__(self, rank: int, size: int, real: dist.ProcessGroup, device: torch.device):
        super().__init__(rank, size)
        self._real, self._device = real, device
        self.begin()

    def begin(self) -> None:
        """A script begins: hook's body. Futures are kept back until :meth:`go_on`."""
        self._events, self._body, self._waiting = [], None, []
        self._beside: list[Callable[[], None]] = []
        self._resume()

    def go_on(self) -> None:
        """The body is done: what it started is there now, and its callbacks run."""
        self._pause()
        self._body, self._events = tuple(self._events), []
        waiting, self._waiting = self._waiting, None
        for work in waiting:
            self._resume()
            work.complete()
            self._pause()
        for job in self._beside:
            self._resume()
            job()
            self._pause()
        self._since = None

    def beside(self, job: Callable[[], None]) -> None:
        """To be done beside the backward pass, after the hook's body, in turn with other buckets' jobs."""
        self._beside.append(job)

    def script(self) -> Script:
        """What was done since :meth:`begin`."""
        return Script(self._body, tuple(self._events), in_turn=bool(self._beside))

    # The collectives, under the names that different versions of torch.distributed call.

    def allreduce(self, tensors, options=None):
        return self._collective("all_reduce", tensors[0], tensors)

    def all_gather_single(self, output, given, options=None):
        self._pause()
        if self.asking:
            everyone = gathered(lambda thing: gather_objects(thing, self._real), given.to("cpu", copy=True))
            output.view(self.size(), -1).copy_(torch.stack(everyone).view(self.size(), -1))
        else:
            output.view(self.size(), -1).copy_(given.reshape(1, -1).expand(self.size(), -1))
        self._resume()
        return self._collective("all_gather", given, [output])

    _allgather_base = all_gather_single

    def all_to_all_single(self, output, given, output_sizes=None, input_sizes=None, options=None):
        self._pause()
        rows = given.view(self.size(), -1)
        if self.asking:
            everyone = gathered(lambda thing: gather_objects(thing, self._real), rows[0].to("cpu", copy=True))
            output.view(self.size(), -1).copy_(torch.stack(everyone))
        else:
            output.view(self.size(), -1).copy_(rows[self.rank()].expand_as(rows))
        self._resume()
        return self._collective("all_to_all", given, [output])

    alltoall_base = all_to_all_single

    def getBackendName(self):  # noqa: N802
        return "echo"

    def _collective(self, kind, given, result):
        self._pause()
        self._events.append(Start(Collective(kind, given.numel() * given.element_size(), self.size())))
        work = _Work(self, result)
        if self._waiting is None:
            self._events.append(Wait())  # callbacks know nothing but waiting
            work.complete()
        else:
            self._waiting.append(work)
        self._resume()
        return work

    def wait_for(self, work) -> None:
        """A hook waits for what it started."""
        self._pause()
        if self._waiting is not None and work in self._waiting:
            self._waiting.remove(work)
            if not isinstance(self._events[-1], Wait):
                self._events.append(Wait())
            work.complete()
        self._resume()

    def _pause(self):
        if self._since is None:
            return
        spent = clock(self._device) - self._since
        self._since = None
        if self._events and isinstance(self._events[-1], Local):
            self._events[-1] = Local(self._events[-1].seconds + spent)
        else:
            self._events.append(Local(spent))

    def _resume(self):
        self._since = clock(self._device)


class EchoLinks(GroupLinks):
    """Links over an Echo."""

    group: Echo

    def ask(self, mine: torch.Tensor) -> torch.Tensor:
        self.group.asking = True
        try:
            return super().ask(mine)
        finally:
            self.group.asking = False


class _Work:
    """One collective over an Echo."""

    def __init__(self, echo, result):
        self._echo, self._result, self._future, self._done = echo, result, torch.futures.Future(), False

    def complete(self):
        if not self._done:
            self._done = True
            self._future.set_result(self._result)

    def wait(self, timeout=None):
        self._echo.wait_for(self)
        return True

    def get_future(self):
        return self._future

    def is_completed(self):
        return self._done


def clock(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rehearse(hook: Hook, buckets: Sequence[Bucket], gradients: Sequence[torch.Tensor], echo: Echo, times: int,
             skipped: int) -> list[list[Script]]:  # fmt: skip
    """Put each bucket through the hook, ``skipped + times`` times, as that many steps would.

    gradients: what the buckets hold at the beginning of each. Returns [times][buckets] scripts.
    """
    found = []
    for _ in range(skipped + times):
        scripts = []
        for bucket, gradient in zip(buckets, gradients):
            bucket.buffer().copy_(gradient)
            echo.begin()
            future = hook(bucket)
            echo.go_on()
            future.wait()
            scripts.append(echo.script())
        found.append(scripts)
    return found[skipped:]
