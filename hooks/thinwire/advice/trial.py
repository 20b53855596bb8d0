"""One model's step and gradients, and the link: what a prediction needs, measured, for one method after another."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, chain

import torch
import torch.distributed as dist

from thinwire.advice import candidates, cost, link, rounds
from thinwire.advice.candidates import Candidate
from thinwire.advice.cost import Collective, Compute, Local, Script, Start, Wait, step_time
from thinwire.advice.rehearsal import Bucket, Echo, clock, rehearse, together
from thinwire.core.exchange import gather_objects
from thinwire.core.memory import wide
from thinwire.local.flight import MEETING
from thinwire.local.fragments import fragments_of
from thinwire.methods import DivideAndShuffle, LocalSteps, Method
from thinwire.methods.local_steps import AUTO
from thinwire.replicas.moments import moment_names, moments_every
from thinwire.state.names import float_buffers, parameter_names

REHEARSALS = 3


class Trial:
    """Predicts steps, the same on every rank. Making it is a collective that measures the link.

    cut: the names of the parameters in each bucket of DDP, in the order in which they become ready. gradients: this
    rank's, by name. compute: when they are ready, and the step without communication. replica_bytes: what a method
    averages in a round beside gradients, see below. copies_in, copies_out: whether DDP's copying into its buckets, and
    out of them, has to be added to compute.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, cut: Sequence[tuple[str, ...]],
                 gradients: dict[str, torch.Tensor], compute: Compute,
                 replica_bytes: Callable[[Method], float], copies_in: bool, copies_out: bool):  # fmt: skip
        self.group, self.device, self.compute = group, device, compute
        self._cut, self._gradients, self._replica_bytes = cut, gradients, replica_bytes
        self._gather = lambda thing: gather_objects(thing, group)
        self._rounds: dict[LocalSteps, rounds.Round] = {}
        self._bytes = sum(g.numel() * g.element_size() for g in gradients.values())
        self.link = link.measure(group, device, 2 * self._bytes)
        self._copies = self._agreed(lambda: [self._copying(names) for names in cut])
        self._added = [Script(copy.body * copies_in, copy.after * copies_out) for copy in self._copies]

    @property
    def alone_s(self) -> float:
        """Seconds of a step with a hook that does nothing."""
        return self.compute.step_s + sum(event.seconds for s in self._added for event in s.body + s.after)

    def predict(self, candidate: Candidate) -> tuple[float, float]:
        """Seconds of a step, and bytes that a rank sends in it. A collective, but for what ``settle`` gave."""
        if isinstance(candidate.what, LocalSteps):
            one = self._round(candidate)
            settled = one.settled(candidate.what, self.alone_s)
            return one.step_s(settled, self.alone_s), one.sent_a_step(settled)
        compute, cut, added, at_end = self.compute, self._cut, self._added, None
        if candidate.one_bucket:
            compute, cut = compute.in_one_bucket(), [tuple(chain.from_iterable(cut))]
            added = [Script(tuple(chain.from_iterable(s.body for s in added)),
                            tuple(chain.from_iterable(s.after for s in added)))]  # fmt: skip
        scripts = [Script()] * len(cut)
        if candidate.make is None:
            at_end = self._averaging(candidate.what)
        else:
            scripts = self._agreed(lambda: self._rehearse(candidate, cut))
        compute = Compute(compute.ready_s, compute.step_s + sum(event.seconds for s in added for event in s.after))
        whole = [replace(script, body=copy.body + script.body) for copy, script in zip(added, scripts)]
        sent = sum(script.sent for script in scripts) + (0 if at_end is None else at_end.sent)
        return step_time(compute, whole, self.link, at_end), sent

    def settle(self, candidate: Candidate) -> Candidate:
        """The same, with the steps of a round that the link asks for where LocalSteps leaves them open. A collective.

        What was measured for it serves the prediction too.
        """
        method = candidate.what
        if not isinstance(method, LocalSteps) or method.every != AUTO:
            return candidate
        one = self._round(candidate)
        found = candidates.candidate(one.settled(method, self.alone_s), gloo=False)
        self._rounds[found.what] = one
        return found

    def _round(self, candidate):
        """A round of local steps, in which all parameters of a fragment are in one message."""
        method = candidate.what
        if method in self._rounds:
            return self._rounds[method]
        if candidate.make is None:
            exchange = self._averaging(method.in_groups())
            return rounds.Round(cost.script_time(exchange, self.link), 0.0, exchange.sent)
        parts = [tuple(name for name, _ in part) for part in fragments_of([*self._gradients.items()], method.fragments)]
        exchanges = [self._agreed(lambda: self._rehearse(candidate, [part], widened=True))[0] for part in parts]
        if nbytes := self._replica_bytes(method):
            there, back = map(Start, cost.owner_exchange(nbytes, self.group.size()))
            exchanges[0] = Script(exchanges[0].body, (*exchanges[0].after, there, Wait(), back))
        held_up = lambda: [Script((Local(rounds.held_up_s(self._gradients, method, REHEARSALS)),))]
        (work,) = self._agreed(held_up)
        first = cost.gathered(MEETING, self.group.size()).seconds(self.link)
        longest = max(cost.script_time(one, self.link) for one in exchanges)
        return rounds.Round(first + longest, work.body[0].seconds, sum(one.sent for one in exchanges))

    def _rehearse(self, candidate, cut, widened=False):
        """This rank's scripts, a bucket each. widened: as differences of parameters are averaged."""
        echo = Echo(self.group.rank(), self.group.size(), self.group, self.device)
        gradients = [self._flat(names) for names in cut]
        gradients = [flat.to(wide(flat.dtype)) for flat in gradients] if widened else gradients
        of = sum(flat.numel() for flat in gradients)
        buckets = [Bucket(names, [self._gradients[name].shape for name in names], i, i == len(cut) - 1, flat.clone(),
                          of) for i, (names, flat) in enumerate(zip(cut, gradients))]  # fmt: skip
        steps = rehearse(candidate.make(echo), buckets, gradients, echo, REHEARSALS, candidate.skipped)
        return [_typical(scripts, statistics.median) for scripts in zip(*steps)]

    def _copying(self, names):
        """What DDP does with one bucket: in before the hook, and out when all is done."""
        given = [self._gradients[name].reshape(-1) for name in names]
        flat, times = self._flat(names), []
        for _ in range(1 + REHEARSALS):
            begin = clock(self.device)
            for part, gradient in zip(flat.split([g.numel() for g in given]), given):
                part.copy_(gradient)
            between = clock(self.device)
            for part, gradient in zip(flat.split([g.numel() for g in given]), given):
                gradient.copy_(part)
            times.append((between - begin, clock(self.device) - between))
        there, back = (statistics.median(column) for column in zip(*times[1:]))
        return Script((Local(there),), (Local(back),))

    def _averaging(self, method: DivideAndShuffle):
        """A round among replicas, after the step, as overlap="none" does it; a mean, where not all rounds are alike."""
        nbytes, ranks = self._replica_bytes(method), candidates.ranks_in_a_group(method, self.group.size())
        there, back = (sum(getattr(s, part)[0].seconds for s in self._copies) for part in ("body", "after"))
        ratio = nbytes / self._bytes
        return Script((Local(ratio * there), Start(Collective("all_reduce", nbytes, ranks))), (Local(ratio * back),))

    def _flat(self, names):
        return torch.cat([self._gradients[name].reshape(-1) for name in names])

    def _agreed(self, measure):
        """What every rank measured at the same time, as one: a step waits for the slowest."""
        everyone = self._gather(together(self._gather, measure))
        return [_typical(scripts, max) for scripts in zip(*everyone)]


def buckets(ddp, order: Sequence[str], parameters: dict[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """Names of the parameters in each bucket that DDP makes of them after its first step, in order.

    order: that in which their gradients are ready. With find_unused_parameters DDP stays with the buckets that it made
    at first, from the end of the model.
    """
    rebuilt = ddp.static_graph or not ddp.find_unused_parameters
    order = order if rebuilt else list(parameters)
    most = ddp.bucket_bytes_cap
    first = min(most, dist._DEFAULT_FIRST_BUCKET_BYTES)
    if hasattr(ddp, "_bucket_config"):
        first = ddp._bucket_config.first_bucket_bytes_cap
    cut, _ = dist._compute_bucket_assignment_by_size([parameters[name] for name in order], [first, most])
    return [tuple(order[i] for i in bucket) for bucket in (cut if rebuilt else reversed(cut))]


def rising(times: Iterable[float]) -> tuple[float, ...]:
    """DDP starts buckets in order: none before the one before it."""
    return tuple(accumulate(times, max))


def replica_bytes(ddp, optimizer: torch.optim.Optimizer, method: DivideAndShuffle | LocalSteps) -> float:
    """What a rank gives to the average of a round: parameters or their blocks, buffers, and Adam's moments where it is
    their turn. In a round's own precision. Of LocalSteps, buffers alone: its parameters go the way of gradients."""
    size = lambda tensors: sum(t.numel() * wide(t.dtype).itemsize for t in tensors)
    averaged = float_buffers(ddp.module, ddp.parameters_to_ignore) if method.average_buffers else ()
    buffers = size(buffer for _, buffer in averaged)
    if isinstance(method, LocalSteps):
        return buffers
    parameters = size(parameter_names(ddp.module, ddp.parameters_to_ignore))
    share = 1.0 if method.blocks is None else method.blocks.density_at(0, ddp.process_group.size())
    every = moments_every(method, optimizer)
    moments = len(moment_names(optimizer)) / every if every else 0
    return (share + moments) * parameters + buffers


def _typical(scripts: Sequence[Script], of: Callable) -> Script:
    """Scripts of the same bucket as one, event by event. Those that do something else than the last are left out."""
    alike = [script for script in scripts if _kinds(script) == _kinds(scripts[-1])]
    parts = {part: tuple(_merged(events, of) for events in zip(*(getattr(script, part) for script in alike)))
             for part in ("body", "after")}  # fmt: skip
    return replace(scripts[-1], **parts)


def _kinds(script):
    return [tuple(type(event) for event in part) for part in (script.body, script.after)]


def _merged(events, of):
    if isinstance(events[0], Local):
        return Local(of(event.seconds for event in events))
    if isinstance(events[0], Start):
        first = events[0].collective
        mean = statistics.mean(event.collective.nbytes for event in events)
        return Start(Collective(first.kind, mean, first.ranks, first.algorithm))
    return events[0]
