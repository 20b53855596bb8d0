"""What runs beside the backward pass: averages that hooks have begun, in waves, and the futures that DDP waits for."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from thinwire.core.carrier import Carrier
from thinwire.core.channel import Channel
from thinwire.core.exchange import GroupLinks
from thinwire.core.reducer import Encoded, Reducer
from thinwire.core.stats import Stats

_Future = torch.futures.Future[torch.Tensor]


class Under:
    """A flat gradient whose average is under way; ``future`` is done when it is there.

    finish: what is to be done with it then.
    """

    def __init__(self, encoded: Encoded, finish: Callable[[torch.Tensor], None] | None):
        self.encoded, self._finish = encoded, finish
        self._flat = encoded.reading.grad
        devices: Any = [self._flat.device] if self._flat.is_cuda else []
        self._error: BaseException | None = None
        self._ready: torch.futures.Future = torch.futures.Future(devices=devices)
        self.future: _Future = self._ready.then(self._result)
        self._encoded = torch.cuda.Event() if self._flat.is_cuda else None
        if self._encoded is not None:
            self._encoded.record(torch.cuda.current_stream(self._flat.device))

    @property
    def device(self) -> torch.device:
        return self._flat.device

    def join_stream(self) -> None:
        """What is done now is done after the encoding, and what that made lives until then."""
        if self._encoded is not None:
            stream = torch.cuda.current_stream(self._flat.device)
            stream.wait_event(self._encoded)
            for tensor in self.encoded.tensors():
                tensor.record_stream(stream)

    def land(self) -> None:
        if self._finish is not None:
            self._finish(self._flat)
        self._ready.set_result(self._flat)

    def fail(self, error: BaseException) -> None:
        if not self._ready.done():
            self._error = error  # set_exception() is for those who wait in Python, and set_result() would pickle it
            self._ready.set_result(self._flat)

    def _result(self, ready):
        ready.value()
        if self._error is not None:
            raise RuntimeError(f"thinwire: an exchange in the background failed: {self._error!r}") from self._error
        return self._flat


class Waves:
    """Where a step's gradients are cut into waves, by their elements alone: in the same places on every rank.

    With two, the first half travels behind the backward pass of the second; more would cost latencies that nothing
    hides. The last one ends with the pass.
    """

    WAVES = 2

    def __init__(self) -> None:
        self._given = self._cuts = 0

    def ends(self, numel: int, of: int) -> bool:
        """Whether a wave ends with these elements. of: how many a pass may bring in all."""
        self._given += numel
        ends = self._given < of and self.WAVES * self._given >= (self._cuts + 1) * of
        self._cuts += ends
        return ends


class Beside:
    """Averages flat gradients beside the backward pass: all that a step has given since the last wave go together.

    Over NCCL, which does not hold up the host, on a stream of its own; over what does, Gloo, by a Carrier.

    make_group: called on every rank, for a group that the carrier uses.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, reducer: Reducer, stats: Stats,
                 make_group: Callable[[dist.ProcessGroup], dist.ProcessGroup]):  # fmt: skip
        self._stats = stats
        on_streams = device.type == "cuda" and "nccl" in str(dist.get_backend_config(group))
        self._carrier = None if on_streams else Carrier.over(group, device, make_group)
        if self._carrier is not None:
            self._carrier.enter(self)
        self.channel = Channel(GroupLinks(group if self._carrier is None else self._carrier.group), reducer, stats)
        self._stream_of: dict[torch.device, torch.cuda.Stream] = {}
        self._wave: list[Under] = []
        self._travelling: list[list[Under]] = []
        self._waves = Waves()
        self._ended: float | None = None

    def begin(self) -> None:
        """A backward pass begins. What one that broke off has left is not sent."""
        self._wave, self._waves, self._ended = [], Waves(), None

    def average(self, encoded: Encoded, finish: Callable[[torch.Tensor], None] | None, numel: int) -> _Future:
        """Average one more, in a wave; see ``end``. numel: of all that this pass may bring."""
        one = Under(encoded, finish)
        self._wave.append(one)
        if self._waves.ends(encoded.reading.grad.numel(), numel):
            self._send()
        return one.future

    def end(self) -> None:
        """The pass has brought all of its gradients."""
        if self._carrier is not None:
            self._ended = time.perf_counter()
        self._send()

    def rest(self) -> None:
        """Wait for what is under way: only a pass that broke off leaves something."""
        if self._travelling and self._carrier is not None and self._carrier.courier.error is None:
            self._carrier.courier.wait()

    def close(self) -> dist.ProcessGroup | None:
        """Be done. Returns a group to be destroyed, where nobody uses it any more."""
        return None if self._carrier is None else self._carrier.leave(self)

    def _send(self):
        wave, self._wave = self._wave, []
        for device in dict.fromkeys(one.device for one in wave):  # one, but for a model on several GPUs
            part = [one for one in wave if one.device == device]
            self._travelling.append(part)
            if self._carrier is not None:
                self._carrier.courier.do(lambda part=part: self._carry(part))
                continue
            if device not in self._stream_of:
                self._stream_of[device] = torch.cuda.Stream(device)
            with torch.cuda.stream(self._stream_of[device]):
                self._carry(part)

    def _carry(self, wave):
        for one in wave:
            one.join_stream()
        self.channel.carry([one.encoded for one in wave])
        ended, now = self._ended, time.perf_counter()
        if ended is not None:
            self._stats.add(waited_s=now - ended)
            self._ended = now
        for one in wave:
            one.land()
        self._travelling.remove(wave)

    def fail(self, error: BaseException) -> None:
        """An exchange has failed: DDP is not to wait for what will not come."""
        for one in [one for wave in (*self._travelling, self._wave) for one in wave]:
            one.fail(error)
