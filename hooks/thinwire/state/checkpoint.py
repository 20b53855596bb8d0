"""A rank's state as plain tensors, numbers and strings, and back, also where the number of ranks has changed."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from thinwire.core import memory
from thinwire.core.reducer import Reducer
from thinwire.methods import Elastic, Method, block_sparse
from thinwire.state import entries, order
from thinwire.state.entries import FORMAT

_log = logging.getLogger("thinwire")
_REQUIRED = {
    "format": entries.FORMATS, "method": entries.DESCRIBED, "rank": entries.COUNT, "world_size": entries.RANKS,
    "memory": entries.BY_NAME, "step": entries.COUNT, "scale": entries.SCALE,
}  # fmt: skip
_OPTIONAL = {
    "controller": entries.BY_NAME, "gradient_norm": entries.NUMBER, "late": entries.LIST, "late_next": entries.NAMES,
}  # fmt: skip

# Parameters by name whose flat gradients are in the order of memory; see thinwire.state.order.
InMemory = Mapping[str, torch.Tensor]


def save(method: Method, reducer: Reducer, in_memory: InMemory) -> dict:
    """One rank's shard; memory maps a state's name to {parameter name: 1-D tensor}."""
    return {
        "format": FORMAT,
        "method": method.describe(),
        "rank": reducer.rank,
        "world_size": reducer.world_size,
        "memory": {
            kind: {name: order.to_saved(tensor, in_memory.get(name)) for name, tensor in store.state_dict().items()}
            for kind, store in reducer.memory.stores().items()
        },
    }


def load(state: Any, method: Method, reducer: Reducer, numels: dict[str, int], in_memory: InMemory) -> dict:
    """Check everything, then put a state back; see ``Handle.load_state_dict``. Returns this rank's shard.

    numels: elements of each parameter of the model. Raises ValueError, with nothing changed, where the state does
    not fit.
    """
    shards = check(state, method, numels)
    by_rank = {shard["rank"]: shard for shard in shards}
    was, now = shards[0]["world_size"], reducer.world_size
    if was == now and reducer.rank in by_rank:
        states, say = by_rank[reducer.rank]["memory"], None
    elif sorted(by_rank) == list(range(was)) and len(shards) == was:
        entries.check_same(shards, ("scale",))
        states = _redistributed(by_rank, reducer.rank, was, now)
        say = ("thinwire: state of %d ranks loaded on %d: residuals are summed onto the ranks there are and scaled by "
               "%d/%d, so that their mean is unchanged", was, now, now, was)  # fmt: skip
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
    if say is not None:
        _log.warning(*say)
    if changed := _changed(method, shards[0]["method"]):
        _log.warning("thinwire: the state was saved with other settings: %s", "; ".join(changed))
    for kind, store in reducer.memory.stores().items():
        tensors = states.get(kind, {}).items()
        store.load_state_dict({name: order.from_saved(tensor, in_memory.get(name)) for name, tensor in tensors})
    return by_rank.get(reducer.rank, shards[0])


def check(state: Any, method: Method, numels: dict[str, int] | None = None) -> list[dict]:
    """The shards of a state in a list. Raises ValueError where it is none, or not of this method, or not of this
    model, whose numels may be unknown yet."""
    shards = entries.shards_of(state)
    sizes = None if numels is None else {name: torch.Size((numel,)) for name, numel in numels.items()}
    for shard in shards:
        entries.check_entries(shard, _REQUIRED, _OPTIONAL, "thinwire state")
        _check_method(shard, method)
        _check_memory(shard, method, sizes)
        _check_late(shard, sizes)
        if controller := shard.get("controller"):
            entries.check_entry("'controller' of the state", controller, "density", entries.DENSITY)
            entries.check_entry("'controller' of the state", controller, "before", entries.NUMBER)
    entries.check_same(shards, ("step", "world_size"))
    return shards


def _changed(method, theirs):
    """In words, the settings that differ."""
    ours = method.describe()
    changed = entries.changed_settings(ours, theirs)
    if ("elastic.beta" in ours) != ("elastic.beta" in theirs):
        changed.append(f"it was saved {'without' if 'elastic.beta' in ours else 'with'} Elastic")
    return changed


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


def _check_method(shard, method):
    """That the tensors mean something to this method."""
    ours, theirs = method.describe(), shard["method"]
    if shard.get("late") and (not isinstance(method, Elastic) or method.beta == 1):
        raise ValueError(
            "load_state_dict: the state holds gradients that Elastic had yet to apply, and with "
            f"{method!r} nothing would: load it with Elastic(..., beta below 1), or call finalize() before saving"
        )
    for field in ("method", "memory", "momentum"):
        if ours.get(field) != theirs.get(field, ours.get(field)):  # Dense had no memory once
            raise ValueError(
                f"load_state_dict: the state was saved with {field}={theirs.get(field)} and this method has "
                f"{field}={ours.get(field)}; its tensors mean nothing to it"
            )


def _check_memory(shard, method, sizes):
    """That the memory is whole: all that this one keeps, of the same parameters."""
    sparse = block_sparse(method.method if isinstance(method, Elastic) else method)
    kept, held = set(memory.of(sparse.memory, sparse.momentum).stores()), shard["memory"]
    if held.keys() != kept:
        keeps = ", ".join(map(repr, sorted(kept))) or "nothing"
        entries.refuse("'memory' of the state", held, f"a dictionary of {keeps}, what memory={sparse.memory!r} keeps")
    for kind in sorted(held):
        entries.check_tensors(kind, held[kind], sizes, flat=True)
    names = {kind: set(held[kind]) for kind in sorted(held)}
    for kind, found in names.items():
        for other, found_there in names.items():
            if alone := sorted(found - found_there):
                raise ValueError(f"load_state_dict: {kind} of the state has {alone[0]!r} and its {other} has not: they "
                                 "must be of the same parameters")  # fmt: skip


def _check_late(shard, sizes):
    """That each late gradient is whole: its step, its tensors, and a learning rate for each."""
    for i, one in enumerate(shard.get("late", ())):
        path = f"'late'[{i}] of the state"
        if not isinstance(one, dict):
            entries.refuse(path, one, "a dictionary of step, lr and tensors")
        entries.check_entry(path, one, "step", entries.COUNT)
        entries.check_entry(path, one, "lr", entries.BY_NAME)
        entries.check_entry(path, one, "tensors", entries.BY_NAME)
        if one["step"] >= shard["step"]:
            entries.refuse(f"'step' of {path}", one["step"], f"below the state's own, {shard['step']}")
        if one["lr"].keys() != one["tensors"].keys() or not one["lr"]:
            entries.refuse(f"'lr' of {path}", one["lr"], "a learning rate for each of its tensors, one at least")
        for name in one["lr"]:
            entries.check_entry(f"'lr' of {path}", one["lr"], name, entries.NUMBER)
        entries.check_tensors(f"what is late, {path},", one["tensors"], sizes, flat=True)
    entries.check_names("'late_next' of the state", shard.get("late_next", ()), sizes)
