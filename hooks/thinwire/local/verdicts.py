"""Which parts of a round were left out, said in the log as soon as that is known without waiting for a GPU."""

import logging

import torch

from thinwire.local.flight import Landed

_log = logging.getLogger("thinwire")


class Verdicts:
    """Of one round: its parts, each with whether it has landed, 0-d bool."""

    def __init__(self, round_: int, found: Landed):
        self._round = round_
        self._names = [part.piece.names for part, _ in found]
        flags = [good for _, good in found]
        on_gpu = bool(flags) and flags[0].is_cuda
        self._flags: torch.Tensor | None = None
        self._there: torch.cuda.Event | None = None
        if on_gpu:
            self._flags = torch.empty(len(flags), dtype=torch.bool, device="cpu", pin_memory=True)
            self._flags.copy_(torch.stack(flags), non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()
        elif flags:
            self._flags = torch.stack(flags)

    def say(self) -> None:
        """Once, where something was left out and it is known."""
        if self._flags is None or (self._there is not None and not self._there.query()):
            return
        flags, self._flags = self._flags.tolist(), None
        left_out = [name for names, good in zip(self._names, flags) if not good for name in names]
        if left_out:
            _log.warning("thinwire: round %d is left out for %d parameters or buffers, %r the first: some rank's are "
                         "inf or NaN. The anchor stays as it was, and ranks whose own are go back to it", self._round,
                         len(left_out), left_out[0])  # fmt: skip
