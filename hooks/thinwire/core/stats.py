"""Bytes and seconds of the steps done so far."""

import threading
from dataclasses import asdict, astuple, dataclass

_lock = threading.Lock()  # one for all: it is held for an addition


@dataclass
class Stats:
    """Totals of one rank.

    steps: backward passes that were averaged, or rounds; bytes_sent and bytes_received, by the arithmetic of the
    collectives (payloads, without TCP's headers); dense_bytes, what a ring all-reduce of the same gradients would send;
    host seconds: encode_s, from the gradient to the message; exchange_s, from there until the last message is here, so
    including whatever it overlaps with; decode_s, until the averaged gradient is written; waited_s, for which the
    backward pass was over and waited for averages (0 where the device alone waits, over NCCL). ``add`` from whichever
    thread; += loses what two add at once.
    """

    steps: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    dense_bytes: int = 0
    encode_s: float = 0.0
    exchange_s: float = 0.0
    decode_s: float = 0.0
    waited_s: float = 0.0

    def count_bytes(self, nbytes: int) -> None:
        """Count a collective in which every rank sends and receives nbytes."""
        self.add(bytes_sent=nbytes, bytes_received=nbytes)

    def add(self, **amounts: float) -> None:
        """Add to fields, by name."""
        with _lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    @property
    def compression(self) -> float:
        """dense_bytes / bytes_sent; 1.0 where nothing was or would be sent."""
        return self.dense_bytes / self.bytes_sent if self.bytes_sent else 1.0

    def __add__(self, other: "Stats") -> "Stats":
        """Field by field."""
        return Stats(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other))))

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"compression": self.compression}


def ring_all_reduce_bytes(nbytes: int, world_size: int) -> int:
    """Bytes that each rank sends, and receives, in a ring all-reduce of nbytes."""
    return 2 * (world_size - 1) * nbytes // world_size
