"""A model whose replicas differ from rank to rank and are averaged in rounds: the handle of Divide-and-Shuffle, and of
local steps in its groups."""

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from thinwire.consistency import measure as consistency
from thinwire.core.stats import Stats, ring_all_reduce_bytes
from thinwire.methods import DivideAndShuffle, LocalSteps
from thinwire.methods.schedules import Partition
from thinwire.replicas.means import Named, pieces
from thinwire.replicas.moments import moment_names, moments_every
from thinwire.replicas.rounds import Moments, Rounds
from thinwire.replicas.stepping import StepHooks
from thinwire.state import agree, entries
from thinwire.state.handle import Handle
from thinwire.state.names import float_buffers, parameter_names
from thinwire.state.steps import Alone

_log = logging.getLogger("thinwire")
_REQUIRED = {
    "format": entries.FORMATS, "method": entries.DESCRIBED, "rank": entries.COUNT, "world_size": entries.RANKS,
    "round": entries.COUNT, "pending": entries.BY_NAME,
}  # fmt: skip
_OPTIONAL = {"since": entries.COUNT}


class Replicas(Handle):
    """One model, its optimizer and the rounds that average its replicas: the handle of DivideAndShuffle, and of
    LocalSteps with a group_size, whose rounds are some steps apart.

    All methods but ``stats`` and ``state_dict`` are collectives: call them on every rank.
    """

    module: torch.nn.Module
    _gradients_wait = False
    _since = 0  # steps since the last round

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, method: DivideAndShuffle,
                 groups: Any, partitions: tuple[Partition, ...], grad_scaler: torch.amp.GradScaler | None = None,
                 ignored: Iterable[str] = (), consistency_every: int = 0, log: Any = None,
                 asked: DivideAndShuffle | LocalSteps | None = None):  # fmt: skip
        """method: of a round. asked: what the user has asked for, where that is more."""
        super().__init__(method if asked is None else asked, consistency_every, log)
        self._by, self._apart = method, getattr(asked, "every", 1)
        self.module = module
        self._ignored = frozenset(ignored)
        self._trained: set[str] = set()
        self._optimizer = optimizer
        self._groups = groups
        self._rounds = Rounds(method, partitions, groups, self._stats)
        self._agreed = True
        self._pending: dict[str, dict[str, torch.Tensor]] | None = None
        self._in_flight = None
        self._moments_every = moments_every(method, optimizer)
        self._moment_names = moment_names(optimizer)
        self._alone = Alone(optimizer)
        try:
            self._hooks = StepHooks(optimizer, self, method.overlap == "bucket", grad_scaler)
        except BaseException:
            self._alone.close()
            raise

    def __repr__(self):
        return f"<{type(self).__name__} of {self.method}, round {self._rounds.done}>"

    # ---- what a user calls ----

    def stats(self) -> dict[str, float]:
        """As of any method, with rounds for steps (of LocalSteps steps, and rounds beside them) and seconds of this
        thread: encode_s until the sums are started, exchange_s waiting for them, decode_s writing the means.
        process_groups: how many this rank is in beside the one of all ranks. Averages over all ranks outside the rounds
        are not counted."""
        rounds = {"rounds": self._rounds.done} if isinstance(self.method, LocalSteps) else {}
        return super().stats() | {"process_groups": len(self._groups)} | rounds

    def begin_pass(self) -> None:
        """A backward pass gives gradients of this rank's own, for a step that has yet to come.

        Raises RuntimeError where parameters change pass after pass without a round: see thinwire.state.steps.Alone.
        """
        self._alone.passes()
        self._gradients_wait = True

    def end_pass(self) -> None:
        """It has given all."""

    def skip_step(self) -> None:
        """Take part in this step's round without a step of one's own.

        For loops that leave out ``optimizer.step()`` on some ranks: the others of the group wait for this one. A
        GradScaler that was given to ``attach`` does it by itself.
        """
        if self.closed:
            return
        if self._between():
            return
        round_ = self._begin()
        for piece in pieces(self._parameters()):
            round_.send(piece, self.moments(piece))
        self._end(round_)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[torch.nn.Module]:
        """The model with the mean of all replicas in it, to evaluate or to save; as it was again afterwards.

        Parameters and floating-point buffers are averaged, other buffers are rank 0's: the same bits on every rank.
        They are restored bit for bit, also when the body raises. A step of the optimizer in the body would be lost,
        so it raises RuntimeError.
        """
        self._refuse_if_evaluating("evaluating()")
        if self.closed:
            yield self.module
            return
        tensors = self._parameters() + self._buffers()
        saved = [tensor.detach().clone() for _, tensor in tensors]
        try:
            self._average_over_all(with_moments=False)
            self._borrowed = True
            yield self.module
        finally:
            self._borrowed = False
            for (_, tensor), one in zip(tensors, saved):
                tensor.detach().copy_(one)

    def finalize(self) -> None:
        """Average parameters, floating-point buffers and what is averaged of the optimizer's state over all ranks:
        replicas become bitwise equal. Training may go on."""
        self._refuse_if_evaluating("finalize()")
        if self.closed:
            return
        self._settle()
        self._average_over_all(with_moments=True)

    def consistency(self) -> dict:
        """Where the replicas stand: consensus_distance, the mean over ranks of ||x_i - mean x||^2 over all
        parameters; round, how many are done; group, the ranks that this one averages with next. Costs an average
        over all ranks. And as of any method, to 2 %, step, inconsistency_max and inconsistency_mean:
        ||x_i - mean x|| / lr; there is no bound for it in the paper on elastic consistency."""
        self._land()
        found = self._measure()
        round_ = self._rounds.over_all()
        parameters = self._parameters()
        apart = torch.zeros((), dtype=torch.float64, device=parameters[0][1].device)
        for piece in pieces(parameters):
            mean = self._rounds.mean_of("parameters", piece, None)
            mean.start(piece, tuple(range(self._groups.size)), self._groups, 0, Stats(), keep=True)
            mean.wait()
            apart += sum(float(c.double().square().sum()) for c in mean.correction())
        round_.send([("apart", apart)], {})
        round_.finish()
        return found | {"round": self._rounds.done, "group": self._rounds.members, "consensus_distance": float(apart)}

    def state_dict(self) -> dict:
        """The round, and with overlap="delayed" the average under way: tensors, numbers and strings, one a rank.

        Replicas differ, so beside it save each rank's own model and optimizer; then a resumed run is bitwise the
        uninterrupted one. Give the model its state after wrapping it: DDP broadcasts rank 0's when it is made.
        """
        self._land()
        waiting = (self._pending or {}).items()
        pending = {kind: {name: tensor.clone() for name, tensor in found.items()} for kind, found in waiting}
        return {"format": entries.FORMAT, "method": self.method.describe(), "rank": self._groups.rank,
                "world_size": self._groups.size, "round": self._rounds.done, "since": self._since,
                "pending": pending}  # fmt: skip

    def load_state_dict(self, state: Any) -> None:
        """Continue from that round. Raises ValueError, with nothing changed, where the state does not fit.

        state: this rank's shard; or the list of all ranks' shards, which also fits another number of ranks where no
        average is under way: all that is in it then is the round. Other settings, such as the schedule, are taken, and
        a warning names them.
        """
        self._refuse_if_closed("load_state_dict()")
        self._land()
        shards = entries.shards_of(state)
        for shard in shards:
            self._check(shard)
        entries.check_same(shards, ("round", "since", "world_size"))
        here = {"rank": self._groups.rank, "world_size": self._groups.size}
        mine = next((shard for shard in shards if here.items() <= shard.items()), shards[0])
        for key, value in here.items() if any(shard["pending"] for shard in shards) else ():
            if mine[key] != value:
                raise ValueError(
                    f"load_state_dict: the state is of {key} {mine[key]}, here it is {value}, and with "
                    "overlap='delayed' an average is under way that belongs to its rank: call finalize() before "
                    "saving, and load into a new handle"
                )
        changed = entries.changed_settings(self.method.describe(), mine["method"])
        if mine["world_size"] != self._groups.size:
            changed.append(f"world_size was {mine['world_size']} and is {self._groups.size}")
        if changed:
            _log.warning("thinwire: the state was saved with other settings: %s", "; ".join(changed))
        pending = {kind: {name: t.detach() for name, t in found.items()} for kind, found in mine["pending"].items()}
        self._rounds.done, self._pending, self._agreed = mine["round"], pending or None, False
        self._since = mine.get("since", 0)

    def _check(self, shard):
        """Raise ValueError where a shard is not of DivideAndShuffle, or not of this model."""
        entries.check_entries(shard, _REQUIRED, _OPTIONAL, f"state of {type(self.method).__name__}")
        if shard.get("since", 0) >= self._apart:
            entries.refuse("'since' of the state", shard["since"], f"below {self._apart}, the steps of a round")
        ours, theirs = self.method.describe()["method"], shard["method"].get("method")
        if theirs != ours:
            raise ValueError(f"load_state_dict: the state was saved with method={theirs} and this method has "
                             f"method={ours}; it means nothing to it")  # fmt: skip
        parameters = {name: p.shape for name, p in self._named().items()}
        buffers = {name: buffer.shape for name, buffer in self._float_buffers()}
        kinds = {"parameters": parameters, "buffers": buffers} | dict.fromkeys(self._moment_names, parameters)
        pending = shard["pending"]
        if not pending.keys() <= kinds.keys():
            entries.refuse("'pending' of the state", pending, f"a dictionary of {', '.join(map(repr, kinds))}")
        for kind, found in pending.items():
            entries.check_tensors(f"{kind} of the average under way,", found, kinds[kind], flat=False)
        for kind in ("parameters", "buffers") if pending else ():
            missing = [name for name in kinds[kind] if name not in pending.get(kind, {})]
            if missing and (kind == "parameters" or kind in pending):
                raise ValueError(f"load_state_dict: the average under way lacks {kind} {', '.join(missing[:3])}: it "
                                 "must have all of the model's, or they would be left out")  # fmt: skip

    def _release(self):
        """Take the hooks off the optimizer too, and destroy the process groups that were made."""
        super()._release()
        self._hooks.remove()
        self._alone.close()
        self._groups.close()

    # ---- what StepHooks calls ----

    def stepped(self) -> None:
        """The optimizer has made its step."""
        self.skip_step()

    def pieces_to_step(self) -> Iterator[list[Named]]:
        """The pieces, each to be stepped before the next one is asked for: it travels meanwhile."""
        round_ = self._begin()
        for piece in pieces(self._parameters()):
            yield piece
            round_.send(piece, self.moments(piece))
        self._waiting = round_

    def pieces_stepped(self) -> None:
        """All have been stepped."""
        round_, self._waiting = self._waiting, None
        self._end(round_)

    def moments(self, piece: list[Named]) -> Moments:
        """What the optimizer keeps of the parameters in a piece, as far as it is averaged."""
        if not self._moments_every:
            return {}
        state = self._optimizer.state
        return {key: [state[p].get(key) if p in state else None for _, p in piece] for key in self._moment_names}

    # ---- rounds ----

    def _parameters(self) -> list[Named]:
        """What is trained, or was in an earlier round: what was frozen since still differs between replicas."""
        named = self._named()
        self._trained.update(name for name, parameter in named.items() if parameter.requires_grad)
        return [(name, parameter) for name, parameter in named.items() if name in self._trained]

    def _named(self) -> dict[str, torch.Tensor]:
        """Every parameter, whether it is trainable now or not."""
        return {name: parameter for parameter, name in parameter_names(self.module, self._ignored, frozen=True).items()}

    def _buffers(self) -> list[Named]:
        return [(name, buffer) for name, buffer in self.module.named_buffers() if name not in self._ignored]

    def _float_buffers(self) -> list[Named]:
        return float_buffers(self.module, self._ignored)

    def _between(self):
        """Count a step. Whether its round is yet to come; then it only brings in what was under way."""
        if not self._agreed:
            self._agree()
        self._since += 1
        if self._since < self._apart:
            self._has_stepped()
            self._settle()
            self._stats.add(steps=1, dense_bytes=self._dense_bytes())
            return True
        self._since = 0
        return False

    def _agree(self):
        """After a load: all ranks are in the same round, and as far in it."""
        here = {"round": str(self._rounds.done), "steps since it": str(self._since)}
        agree.require(self._groups.gather_objects(here))
        self._agreed = True

    def _has_stepped(self):
        self._refuse_if_evaluating("optimizer.step()")
        self._alone.stepped()
        self._gradients_wait = False

    def _dense_bytes(self):
        nbytes = sum(p.numel() * p.element_size() for _, p in self._parameters())
        return ring_all_reduce_bytes(nbytes, self._groups.size)

    def _begin(self):
        self._has_stepped()
        if not self._agreed:
            self._agree()
        self._settle()
        self._stats.dense_bytes += self._dense_bytes()
        return self._rounds.begin(self._moments_every)

    def _end(self, round_):
        round_.send_rest(self._float_buffers() if self._by.average_buffers else ())
        if self._by.overlap == "delayed":
            self._in_flight = round_
        else:
            round_.finish()
        if self._every and self._rounds.done % self._every == 0:
            self._record(self._measure())

    def _measure(self):
        """||x_i - mean x|| / lr of all ranks, from sketches of the replicas."""
        rates = {p: float(group["lr"]) or math.nan for group in self._optimizer.param_groups for p in group["params"]}
        mine = consistency.sketch(
            (name, p.detach().reshape(-1).double() / rates[p]) for name, p in self._parameters() if p in rates
        )
        gather = lambda numbers: torch.stack(self._groups.gather_objects(numbers))
        apart = consistency.measure(-mine, mine, 0.0, gather).apart
        mean = math.fsum(apart) / len(apart)
        return {"step": self._rounds.done, "inconsistency_max": max(apart), "inconsistency_mean": mean,
                "gradient_norm": None, "bound": None}  # fmt: skip

    def _settle(self):
        """Apply the average that was under way, if any: x += mean - what was sent."""
        self._land()
        if self._pending is None:
            return
        parameters, buffers = self._named(), dict(self._float_buffers())
        if not self._has_moments(parameters):
            raise RuntimeError(
                "an average of the optimizer's state is under way, and the optimizer has no such state: load its "
                "state_dict too before going on"
            )
        for kind, found in self._pending.items():
            for name, correction in found.items():
                if kind in self._moment_names:
                    target = self._optimizer.state[parameters[name]][kind]
                else:
                    target = (buffers if kind == "buffers" else parameters)[name].detach()
                target += correction.to(target)
                if kind not in ("parameters", "buffers", "exp_avg"):
                    target.clamp_(min=0)  # second moments
        self._pending = None

    def _has_moments(self, parameters):
        """Whether the optimizer has all moments that the average under way is to change."""
        state = self._optimizer.state
        wanted = [(n, key) for key in self._moment_names for n in self._pending.get(key, ())]
        return all(key in state.get(parameters[name], {}) for name, key in wanted)

    def _land(self):
        """Wait for the average under way, and keep what it will change."""
        if self._in_flight is not None:
            self._pending, self._in_flight = self._in_flight.corrections(), None

    def _average_over_all(self, with_moments):
        self._land()
        round_ = self._rounds.over_all()
        for piece in pieces(self._parameters()):
            round_.send(piece, self.moments(piece) if with_moments else {})
        round_.send_rest(self._float_buffers())
        round_.finish()
        for _, buffer in self._buffers():
            if not buffer.is_floating_point():
                self._groups.broadcast(buffer)
