"""A rank's state of local steps as plain tensors, numbers and strings, and back, also on another number of ranks."""

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch

from thinwire.core import memory
from thinwire.local.anchor import in_pieces
from thinwire.local.flight import KINDS, flight_of
from thinwire.state import entries

if TYPE_CHECKING:
    from thinwire.local.steps import Anchored

_log = logging.getLogger("thinwire")
_PACE = {
    "every": entries.RANKS, "overlap": entries.COUNT, "exchange_s": entries.NUMBER, "step_s": entries.NUMBER,
}  # fmt: skip
_REQUIRED = {
    "format": entries.FORMATS, "method": entries.DESCRIBED, "rank": entries.COUNT, "world_size": entries.RANKS,
    "step": entries.COUNT, "round": entries.COUNT, "launched": entries.COUNT, "begins_at": entries.COUNT,
    "lands_at": entries.COUNT, "pace": entries.BY_NAME, "anchor": entries.BY_NAME, "momentum": entries.BY_NAME,
    "buffers": entries.BY_NAME, "memory": entries.BY_NAME, "flight": entries.BY_NAME, "trained": entries.NAMES,
}  # fmt: skip
_OPTIONAL = {"anchor_only": entries.Entry("True", lambda value: value is True)}
_FLIGHT = tuple(prefix + kind for prefix in ("", "buffer ") for kind in KINDS)
_OWN = ("origin", "left")  # what of a flight is one rank's


def save(handle: "Anchored", anchor_only: bool) -> dict:
    """This rank's shard, or what is common to all ranks."""
    links, parameters = handle._behind.links, handle._all
    anchors = {
        kind: {name: one.view(parameters[name].shape) for name, one in store.state_dict().items()}
        for kind, store in handle._anchor.stores().items()
    }
    under_way = handle._flight
    flight = {} if under_way is None or (anchor_only and under_way.failed) else under_way.state_dict()
    if anchor_only:
        flight = {kind: held for kind, held in flight.items() if not kind.endswith(_OWN)}
    stores = {} if anchor_only else handle._rounds.reducer.memory.stores()
    return {
        "format": entries.FORMAT, "method": handle.method.describe(), "rank": 0 if anchor_only else links.rank,
        "world_size": links.size, "step": handle._step, "round": handle._round, "launched": handle._launched,
        "begins_at": handle._begins_at, "lands_at": handle._lands_at, "pace": handle._pace.state_dict(), **anchors,
        "trained": sorted(name for name, _ in handle._parameters()),
        "buffers": {name: one.clone() for name, one in handle._anchor_buffers.items()},
        "memory": {kind: store.state_dict() for kind, store in stores.items()}, "flight": flight,
    } | ({"anchor_only": True} if anchor_only else {})  # fmt: skip


def load(handle: "Anchored", state: Any) -> None:
    """Check everything, then put a state back; see ``Anchored.load_state_dict``."""
    shards = entries.shards_of(state)
    for shard in shards:
        _check(handle, shard)
    entries.check_same(shards, ("step", "round", "world_size"))
    here = handle._behind.links
    same = shards[0]["world_size"] == here.size and not shards[0].get("anchor_only")
    mine = next((one for one in shards if same and one["rank"] == here.rank), None)
    if same and mine is None:
        raise ValueError(
            f"load_state_dict got the state of rank {sorted(one['rank'] for one in shards)} of {here.size} on rank "
            f"{here.rank}: pass this rank's own shard, the list of all shards, or a state of state_dict(anchor=True)"
        )
    shard = shards[0] if mine is None else mine
    if changed := entries.changed_settings(handle.method.describe(), shard["method"]):
        _log.warning("thinwire: the state was saved with other settings: %s", "; ".join(changed))
    if handle._flight is not None:
        with contextlib.suppress(RuntimeError):  # what it brings is dropped; but it is not to change what is loaded
            handle._flight.wait()
    handle._steps.forget()
    handle._step, handle._round = shard["step"], shard["round"]
    handle._launched, handle._begins_at, handle._lands_at = shard["launched"], shard["begins_at"], shard["lands_at"]
    handle._together_at = None
    handle._owed, handle._agreed, handle._begun = 0, False, bool(shard["anchor"])
    handle._pace.load_state_dict(shard["pace"])
    for kind, store in handle._anchor.stores().items():
        store.load_state_dict({name: one.to(handle._device) for name, one in shard[kind].items()})
    handle._anchor_buffers = {name: one.detach().clone() for name, one in shard["buffers"].items()}
    handle._trained, handle._anchored, handle._dense_bytes = set(shard["trained"]), set(shard["anchor"]), None
    parameters, buffers = handle._parameters(), handle._float_buffers()
    flight = flight_of(shard["launched"], shard["flight"], parameters, buffers) if shard["flight"] else None
    for kind, store in handle._rounds.reducer.memory.stores().items():
        held = {} if mine is None else shard["memory"][kind]
        store.load_state_dict({name: one.to(handle._device) for name, one in held.items()})
    handle._flight = flight
    handle._restart_clock()
    if handle._begun:
        handle._part()
    if mine is None and handle._begun:
        _from_anchor(handle, shards)


def _from_anchor(handle, shards):
    """Every rank goes on from the anchor. What was under way was everybody's, and lands."""
    flight, handle._flight = handle._flight, None
    for piece in in_pieces(handle._parameters()):
        piece.write(handle._anchor.values(piece))
    if flight is not None:
        for part in (*flight.parameters, *flight.buffers):
            part.origin = part.left = None
        flight.land(handle._anchor, handle._anchor_buffers)
        for piece in in_pieces(handle._parameters()):
            piece.write(handle._anchor.values(piece))
    for piece in in_pieces((n, one) for n, one in handle._float_buffers() if n in handle._anchor_buffers):
        piece.write(piece.flat(handle._anchor_buffers))
    lost = handle._step - handle._launched
    shard, stays = shards[0], handle.method.method.as_block_sparse().memory == "weights"
    kept = [one for some in shards for held in some["memory"].values() for one in held.values()]
    handle._launched, handle._begins_at = handle._step, handle._step + handle._pace.first
    if not (lost or stays or shard.get("anchor_only") or any(bool(one.any()) for one in kept)):
        return  # it was saved after finalize()
    _log.warning(
        "thinwire: a state of %d ranks%s is loaded on %d from its anchor: what the ranks had done in the %d steps "
        "since the last round was sent, and what waited in their memories, is lost", shard["world_size"],
        ", of state_dict(anchor=True)," if shard.get("anchor_only") else "", handle._behind.links.size, lost,
    )  # fmt: skip


def _check(handle, shard):
    """Raise ValueError where a shard is not of LocalSteps, not of this model, or not whole."""
    entries.check_entries(shard, _REQUIRED, _OPTIONAL, "state of LocalSteps")
    ours, theirs = handle.method.describe(), shard["method"]
    if theirs.get("method") != ours["method"]:
        raise ValueError(f"load_state_dict: the state was saved with method={theirs.get('method')} and this method has "
                         f"method={ours['method']}; it means nothing to it")  # fmt: skip
    for key, entry in _PACE.items():
        entries.check_entry("'pace' of the state", shard["pace"], key, entry)
    everything = {name: p.shape for name, p in handle._all.items()}
    buffers = {name: buffer.shape for name, buffer in handle._float_buffers()}
    entries.check_tensors("anchor", shard["anchor"], everything, flat=False)
    entries.check_tensors("momentum", shard["momentum"], everything, flat=False)
    entries.check_tensors("buffers", shard["buffers"], buffers, flat=False)
    entries.check_names("'trained' of the state", shard["trained"], everything)
    missing = [name for name, _ in handle._parameters() if name not in shard["anchor"]]
    if shard["anchor"] and missing:
        raise ValueError(f"load_state_dict: the anchor lacks {', '.join(missing[:3])}: it must have all parameters "
                         "that are trained")  # fmt: skip
    _check_memory(handle, shard, everything)
    _check_flight(shard, everything, buffers)


def _check_memory(handle, shard, everything):
    sparse = handle.method.method.as_block_sparse()
    kept = set(memory.of(sparse.memory, sparse.momentum).stores())
    if not shard.get("anchor_only") and shard["memory"].keys() != kept:
        keeps = ", ".join(map(repr, sorted(kept))) or "nothing"
        allowed = f"a dictionary of {keeps}, what memory={sparse.memory!r} keeps"
        entries.refuse("'memory' of the state", shard["memory"], allowed)
    for kind, held in shard["memory"].items():
        entries.check_tensors(kind, held, everything, flat=True)


def _check_flight(shard, everything, buffers):
    found = shard["flight"]
    if not found.keys() <= set(_FLIGHT):
        entries.refuse("'flight' of the state", found, f"a dictionary of {', '.join(map(repr, _FLIGHT))}")
    if found and "mean" not in found:
        raise ValueError("load_state_dict: 'flight' of the state lacks 'mean': what has arrived of the round under way")
    for kind, held in found.items():
        shapes = buffers if kind.startswith("buffer ") else everything
        if kind.endswith("sent"):
            held = {name: one.float() if isinstance(one, torch.Tensor) else one for name, one in held.items()}
        entries.check_tensors(f"{kind} of the round under way", held, shapes, flat=False)
        prefix = "buffer " if kind.startswith("buffer ") else ""
        if held.keys() != found.get(prefix + "mean", {}).keys():
            raise ValueError(f"load_state_dict: {kind} of the round under way is of other names than what has arrived")
