"""A rank's state as plain tensors, numbers and strings, and back, also where the number of ranks has changed."""

import logging
from collections.abc import Sequence

from thinwire.core.reducer import Reducer
from thinwire.methods import Elastic, Method

_log = logging.getLogger("thinwire")
FORMAT = 1
_KEYS = {"format", "method", "rank", "world_size", "memory", "step", "scale"}


def save(method: Method, reducer: Reducer) -> dict:
    """One rank's shard; memory maps a state's name to {parameter name: 1-D tensor}."""
    return {
        "format": FORMAT,
        "method": method.describe(),
        "rank": reducer.rank,
        "world_size": reducer.world_size,
        "memory": {name: store.state_dict() for name, store in reducer.memory.stores().items()},
    }


def load(shards: dict | Sequence[dict], method: Method, reducer: Reducer, numels: dict[str, int]) -> dict:
    """Check everything, then put a state back; see ``Handle.load_state_dict``. Returns this rank's shard.

    numels: elements of each parameter of the model. Raises ValueError, with nothing changed, where the state does
    not fit.
    """
    shards = check(shards, method, numels)
    by_rank = {shard["rank"]: shard for shard in shards}
    was, now = shards[0]["world_size"], reducer.world_size
    if was == now and reducer.rank in by_rank:
        states = by_rank[reducer.rank]["memory"]
    elif sorted(by_rank) == list(range(was)) and len(shards) == was:
        states = _redistributed(by_rank, reducer.rank, was, now)
        _log.warning("thinwire: state of %d ranks loaded on %d: residuals are summed onto the ranks there are and "
                     "scaled by %d/%d, so that their mean is unchanged", was, now, now, was)  # fmt: skip
    else:
        raise ValueError(
            f"load_state_dict got the state of rank {sorted(by_rank)} of {was} on rank {reducer.rank} of {now}: pass "
            "this rank's own shard, or a list of the shards of all ranks if their number has changed, so that no "
            "residual is lost"
        )
    late = any(shard.get("late") for shard in shards)
    differed = Elastic.differed(shards[0]["method"])
    if late and differed != method.replicas_differ:  # type: ignore[attr-defined]  # check: late is Elastic's only
        raise ValueError(
            f"load_state_dict: the state was saved with {shards[0]['method']}, whose late gradients "
            f"{'differ from rank to rank' if differed else 'are the same on all ranks'}, and with {method!r} they "
            "would be applied otherwise: call finalize() before saving"
        )
    if was != now and late and (differed or now == 1):
        raise ValueError(
            f"load_state_dict got the state of {was} ranks on {now}, with gradients that Elastic had yet to apply and "
            "that belong to those ranks: call finalize() before saving"
        )
    for name, store in reducer.memory.stores().items():
        store.load_state_dict(states.get(name, {}))
    return by_rank.get(reducer.rank, shards[0])


def check(shards: dict | Sequence[dict], method: Method, numels: dict[str, int] | None = None) -> list[dict]:
    """The shards in a list. Raises ValueError where they are none, or not of this method, or not of this model, whose
    numels may be unknown yet. Says so in the log where only settings differ."""
    shards = [shards] if isinstance(shards, dict) or shards is None else list(shards)
    if not shards:
        raise ValueError("load_state_dict got an empty list: pass this rank's shard, or the shards of all ranks")
    for shard in shards:
        _check(shard, method, numels)
    for key in ("step", "world_size"):
        if len({shard[key] for shard in shards}) > 1:
            raise ValueError(f"load_state_dict got shards of different {key}: {[shard[key] for shard in shards]}")
    ours, theirs = method.describe(), shards[0]["method"]
    changed = [f"{key} was {theirs[key]} and is {value}" for key, value in ours.items()
               if theirs.get(key, value) != value]  # fmt: skip
    if ("elastic.beta" in ours) != ("elastic.beta" in theirs):
        changed.append(f"it was saved {'without' if 'elastic.beta' in ours else 'with'} Elastic")
    if changed and numels is not None:
        _log.warning("thinwire: the state was saved with other settings: %s", "; ".join(changed))
    return shards


def _redistributed(by_rank, rank, was, now):
    """Old ranks' states dealt to the new ranks round robin; a control variate's own becomes the common mean."""
    states = {}
    for name in by_rank[0]["memory"]:
        if name == "mean":
            states["mean"] = states["own"] = by_rank[0]["memory"]["mean"]
        elif name != "own":
            merged = {}
            for old in range(rank, was, now):
                for parameter, tensor in by_rank[old]["memory"][name].items():
                    share = tensor * (now / was)
                    merged[parameter] = merged[parameter] + share if parameter in merged else share
            states[name] = merged
    return states


def _check(shard, method, numels):
    if not isinstance(shard, dict) or not _KEYS <= shard.keys() or shard["format"] != FORMAT:
        found = sorted(shard) if isinstance(shard, dict) else type(shard).__name__
        raise ValueError(f"load_state_dict got {found}: not a thinwire state of format {FORMAT}")
    ours, theirs = method.describe(), shard["method"]
    if shard.get("late") and (not isinstance(method, Elastic) or method.beta == 1):
        raise ValueError(
            "load_state_dict: the state holds gradients that Elastic had yet to apply, and with "
            f"{method!r} nothing would: load it with Elastic(..., beta below 1), or call finalize() before saving"
        )
    for field in ("method", "memory", "momentum"):
        if ours.get(field) != theirs.get(field):
            raise ValueError(
                f"load_state_dict: the state was saved with {field}={theirs.get(field)} and this method has "
                f"{field}={ours.get(field)}; its tensors mean nothing to it"
            )
    held = list(shard["memory"].items()) + [("what is late", late["tensors"]) for late in shard.get("late", ())]
    for name, tensors in held if numels is not None else ():
        for parameter, tensor in tensors.items():
            if numels.get(parameter) != tensor.numel():
                has = f"{numels[parameter]} elements" if parameter in numels else "no such parameter"
                raise ValueError(
                    f"load_state_dict: {name} of {parameter!r} has {tensor.numel()} elements and the model has {has}"
                )
