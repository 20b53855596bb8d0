"""Who averages with whom, round after round: one frozen class a schedule, one verb, ``partitions``.

A partition splits the ranks into groups; each group averages, and rounds go through the schedule's partitions over and
over. Averaging inside the groups of any partition, ragged ones too, leaves the mean over all ranks as it is. What
differs is how fast the ranks approach it.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

Group = tuple[int, ...]
Partition = tuple[Group, ...]


@dataclass(frozen=True)
class Schedule:
    """Base of every schedule."""

    def partitions(self, world_size: int, group_size: int, seed: int, hosts: tuple[str, ...]) -> tuple[Partition, ...]:
        """The cycle of partitions of the ranks 0 to world_size - 1, the same on every rank.

        group_size: the most ranks in a group. hosts: the name of each rank's host, by rank.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Butterfly(Schedule):
    """Exact mean of all ranks after one cycle: log_s(n) rounds for n = s^k ranks in groups of s.

    Ranks are numbers of mixed radix, each radix at most the group size; in round t groups are made of the ranks that
    differ in digit t. Where digit t - 1 has the same radix it runs backwards along with it, which changes nothing of
    the above, because all these groups are cosets of subgroups whose sum is everything, and makes four ranks in pairs
    the pattern of DS-Sync's authors: {0,1} {2,3}, then {0,3} {1,2}. World sizes with a prime factor above the group
    size have no such digits: they get :class:`Ring`.
    """

    def partitions(self, world_size: int, group_size: int, seed: int, hosts: tuple[str, ...]) -> tuple[Partition, ...]:
        radices = _radices(world_size, group_size)
        if radices is None:
            return Ring().partitions(world_size, group_size, seed, hosts)
        return tuple(_split(range(world_size), lambda rank: _coset(rank, radices, t)) for t in range(len(radices)))


@dataclass(frozen=True)
class Ring(Schedule):
    """For any number of ranks, primes too: neighbours on a ring, in strides that grow like the powers of group_size.

    The last group of a round is smaller where group_size does not divide the ranks; every round starts somewhere
    else on the ring, so that it is not always the same ranks that are left with it.
    """

    def partitions(self, world_size: int, group_size: int, seed: int, hosts: tuple[str, ...]) -> tuple[Partition, ...]:
        rounds = _rounds(world_size, group_size)
        found = []
        for t in range(max(rounds, 1)):
            stride = _coprime(group_size**t, world_size)
            order = [(t * group_size + i * stride) % world_size for i in range(world_size)]
            found.append(_chunks(order, group_size))
        return tuple(found)


@dataclass(frozen=True)
class Random(Schedule):
    """A cycle over a fixed family of random partitions, drawn from the seed.

    family: how many partitions. Every one needs process groups of its own, so it is small; more come closer to a
    fresh partition in every round, whose contraction is (n - s) / (s (n - 1)) a round. A family that would leave some
    ranks apart for good is drawn again.
    """

    family: int = 8

    def __post_init__(self):
        if isinstance(self.family, bool) or not isinstance(self.family, int) or self.family < 1:
            raise ValueError(f"Random(family={self.family!r}): family must be an integer of at least 1")

    def partitions(self, world_size: int, group_size: int, seed: int, hosts: tuple[str, ...]) -> tuple[Partition, ...]:
        generator = random.Random(f"thinwire {seed} {world_size} {group_size}")
        for _ in range(1000):
            found = []
            for _ in range(self.family):
                order = list(range(world_size))
                generator.shuffle(order)
                found.append(_chunks(order, group_size))
            if connected(found):
                break
        return tuple(found)


@dataclass(frozen=True)
class Hosts(Schedule):
    """Most rounds inside a host, where the network is fast; every ``across_every``-th across hosts.

    hosts: the name of each rank's host (or rack), by rank; None takes what the ranks say of themselves
    (GROUP_RANK of torchrun, SLURM_NODEID, or the machine's name). Inside a host the schedule is a butterfly of its
    ranks; across, ranks in the same place on their hosts meet, in a butterfly of the hosts. across_every=1 leaves the
    ranks of a host apart, so it is for hosts of one rank.
    """

    hosts: tuple[str, ...] | None = None
    across_every: int = 4

    def __post_init__(self):
        if self.hosts is not None:
            object.__setattr__(self, "hosts", tuple(map(str, self.hosts)))
        if isinstance(self.across_every, bool) or not isinstance(self.across_every, int) or self.across_every < 1:
            raise ValueError(
                f"Hosts(across_every={self.across_every!r}): across_every must be an integer of at least 1"
            )

    def partitions(self, world_size: int, group_size: int, seed: int, hosts: tuple[str, ...]) -> tuple[Partition, ...]:
        hosts = hosts if self.hosts is None else self.hosts
        if len(hosts) != world_size:
            raise ValueError(f"Hosts(hosts={self.hosts!r}) names {len(hosts)} hosts for {world_size} ranks: one a rank")
        by_host = defaultdict(list)
        for rank, host in enumerate(hosts):
            by_host[host].append(rank)
        inside = _together([self._cycle(ranks, group_size, seed) for ranks in by_host.values()])
        places = range(max(map(len, by_host.values())))
        columns = [[ranks[place] for ranks in by_host.values() if place < len(ranks)] for place in places]
        across = _together([self._cycle(ranks, group_size, seed) for ranks in columns])
        if len(by_host) == 1:
            return inside
        if len(by_host) == world_size:
            return across
        order, within = [], self.across_every - 1
        # As often through the crossings as it takes to use every partition inside the hosts.
        times = max(1, math.ceil(len(inside) / max(within * len(across), 1)))
        for c, crossing in enumerate(across * times):
            order += [inside[(c * within + i) % len(inside)] for i in range(within)] + [crossing]
        return tuple(order)

    def _cycle(self, ranks, group_size, seed):
        """A butterfly of these ranks."""
        size = min(group_size, len(ranks))
        if size < 2:
            return (tuple((rank,) for rank in ranks),)
        cycle = Butterfly().partitions(len(ranks), size, seed, ())
        return tuple(tuple(tuple(ranks[i] for i in group) for group in partition) for partition in cycle)


BY_NAME = {"butterfly": Butterfly(), "ring": Ring(), "random": Random(), "hosts": Hosts()}


def connected(partitions: Iterable[Partition]) -> bool:
    """Whether the groups of these partitions, taken together, join all ranks."""
    found: list[set[int]] = []
    for group in chain.from_iterable(partitions):
        joined = [one for one in found if not one.isdisjoint(group)]
        found = [one for one in found if one not in joined] + [set(group).union(*joined)]
    return len(found) == 1


def default_group_size(world_size: int) -> int:
    """The divisor of world_size next to its square root (2 of 4 and 8, 4 of 16), or where there is none, the root."""
    root = world_size**0.5
    divisors = [size for size in range(2, world_size) if world_size % size == 0]
    return min(divisors, key=lambda size: abs(size - root)) if divisors else min(world_size, max(2, round(root)))


def _radices(n, group_size):
    """The digits' radices, largest first, or None where a prime factor of n is above group_size."""
    radices = []
    while n > 1:
        radix = next((size for size in range(min(group_size, n), 1, -1) if n % size == 0), None)
        if radix is None:
            return None
        radices.append(radix)
        n //= radix
    return radices or [1]


def _coset(rank, radices, t):
    """What the ranks of one group in round t have in common."""
    digits = []
    for radix in radices:
        digits.append(rank % radix)
        rank //= radix
    moving = digits[t]
    digits[t] = 0
    if t > 0 and radices[t - 1] == radices[t]:
        digits[t - 1] = (digits[t - 1] + moving) % radices[t]
    return tuple(digits)


def _rounds(n, group_size):
    """How many rounds a message needs at least to reach all: log of n to the base group_size, rounded up."""
    rounds, reached = 0, 1
    while reached < n:
        rounds, reached = rounds + 1, reached * group_size
    return rounds


def _coprime(stride, n):
    """The first stride from this one on (modulo n) that visits all n places."""
    stride %= n
    while n > 1 and math.gcd(stride, n) != 1:
        stride += 1
    return stride


def _split(ranks, key):
    groups = defaultdict(list)
    for rank in ranks:
        groups[key(rank)].append(rank)
    return _canonical(groups.values())


def _chunks(order, size):
    return _canonical(order[i : i + size] for i in range(0, len(order), size))


def _canonical(groups):
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def _together(cycles):
    """Cycles of disjoint ranks side by side, as one; as long as the longest, the others begin again."""
    length = max(map(len, cycles))
    return tuple(_canonical(chain.from_iterable(cycle[t % len(cycle)] for cycle in cycles)) for t in range(length))
