"""What a saved state must hold, entry by entry: tables of checks that run before anything is changed.

A file may be half written, edited by hand or of something else, so nothing about it is taken for granted. Each check
raises ValueError that names the entry, shows what was found and says what is allowed.
"""

import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

FORMAT = 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Entry:
    """What may stand in one place, in words and as a test."""

    allowed: str
    is_allowed: Callable[[Any], bool]


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_names(value, kind):
    return isinstance(value, kind) and all(isinstance(name, str) for name in value)


COUNT = Entry("an integer of at least 0", lambda value: _is_integer(value) and 0 <= value < 2**63)
RANKS = Entry("an integer of at least 1", lambda value: _is_integer(value) and 1 <= value < 2**63)
NUMBER = Entry("a finite number of at least 0", lambda value: _is_number(value) and value >= 0)
SCALE = Entry("the GradScaler's scale, a positive number that float32 can hold, or 0 for none",
              lambda value: _is_number(value) and (value == 0 or _SMALLEST <= value <= _LARGEST))  # fmt: skip
DENSITY = Entry("a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1)
DESCRIBED = Entry("a dictionary of strings, what describe() of the method gave",
                  lambda value: _is_names(value, dict) and _is_names(value.values(), Iterable))  # fmt: skip
BY_NAME = Entry("a dictionary by name", lambda value: _is_names(value, dict))
LIST = Entry("a list", lambda value: isinstance(value, list))
NAMES = Entry("a list of parameters' names", lambda value: _is_names(value, (list, tuple)))
FORMATS = Entry(f"{FORMAT}, the one format that there is", lambda value: _is_integer(value) and value == FORMAT)


def shards_of(state: Any) -> list:
    """A state as a list of shards. Raises ValueError where it is neither one nor some."""
    shards = list(state) if isinstance(state, (list, tuple)) else [state]
    if not shards:
        raise ValueError("load_state_dict got an empty list: pass this rank's shard, or the shards of all ranks")
    return shards


def check_entries(holder: Any, required: dict[str, Entry], optional: dict[str, Entry], what: str) -> None:
    """Raise ValueError where a shard is no dictionary, lacks a required entry or has one that is not allowed.

    what: the state that it should be, in words.
    """
    missing = [key for key in required if key not in holder] if isinstance(holder, dict) else []
    if missing or not isinstance(holder, dict):
        found = shown(holder)
        lacks = f": it lacks {', '.join(map(repr, missing))}" if missing else ""
        raise ValueError(f"load_state_dict got {found}: not a {what} of format {FORMAT}{lacks}")
    for key, entry in (required | optional).items():
        if key in holder and not entry.is_allowed(holder[key]):
            if key == "format":
                what_of = f"not a {what} of format {FORMAT}: "
                refuse(f"{what_of}its format", holder[key], entry.allowed)
            refuse(f"{key!r} of the state", holder[key], entry.allowed)
    if holder["rank"] >= holder["world_size"]:
        refuse("'rank' of the state", holder["rank"], f"below its world_size, {shown(holder['world_size'])}")


def check_entry(path: str, holder: dict, key: str, entry: Entry) -> None:
    """Raise ValueError where a nested entry is missing or not allowed. path: where holder is, in words."""
    if key not in holder:
        raise ValueError(f"load_state_dict: {path} lacks {key!r}: it must be {entry.allowed}")
    if not entry.is_allowed(holder[key]):
        refuse(f"{key!r} of {path}", holder[key], entry.allowed)


def check_tensors(path: str, tensors: Any, shapes: dict[str, torch.Size] | None, flat: bool) -> None:
    """Raise ValueError where tensors are not finite floating-point ones, by the names and of the sizes of the model.

    shapes: of the model's tensors by name, or None where the model is not known yet. flat: whether they are 1-D, in the
    order of contiguous parameters; else of the model's shapes.
    """
    if not BY_NAME.is_allowed(tensors):
        refuse(path, tensors, "a dictionary of tensors by parameter name")
    for name, tensor in tensors.items():
        where = f"{path} of {name!r}"
        if not isinstance(tensor, torch.Tensor):
            refuse(where, tensor, "a tensor")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
            refuse(where, tensor, "a dense tensor of real floating-point numbers, with values")
        if shapes is not None:
            _check_size(where, name, tensor, shapes)
        shape = None if shapes is None or flat else shapes[name]
        if tensor.dim() != 1 if flat else shape is not None and tensor.shape != shape:
            refuse(where, tensor, "1-D" if flat else f"of shape {tuple(shape or ())}, as the model's")
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"load_state_dict: {where} has {bad} elements that are not finite (inf or NaN), and all of them must "
                "be: training would go on with NaN; load an older state, or start without one"
            )


def _check_size(where, name, tensor, shapes):
    if name in shapes and tensor.numel() == shapes[name].numel():
        return
    has = f"{shapes[name].numel()} elements" if name in shapes else f"no such parameter or buffer{_near(name, shapes)}"
    raise ValueError(f"load_state_dict: {where} has {tensor.numel()} elements and the model has {has}")


def _near(name, shapes):
    """What the name may be meant to be: wrappers put their own before it."""
    for other in (name.removeprefix("module."), name.replace("_orig_mod.", ""), f"module.{name}"):
        if other in shapes and other != name:
            return f"; its name here is {other!r}"
    return ""


def check_names(path: str, names: Collection[str], known: Collection[str] | None) -> None:
    """Raise ValueError where one of the names is no parameter's. known: None where the model is not known yet."""
    for name in names:
        if known is not None and name not in known:
            raise ValueError(f"load_state_dict: {path} names {name!r}, and the model has no such parameter")


def check_same(shards: list[dict], keys: Collection[str]) -> None:
    """Raise ValueError where shards of one state differ in what all of them must share, the method among it."""
    for shard in shards:
        if shard["method"] != shards[0]["method"]:
            differ = "; ".join(changed_settings(shard["method"], shards[0]["method"])) or "other settings"
            raise ValueError(f"load_state_dict got shards of different methods: {differ}: pass shards of one save")
    for key in keys:
        found = [shard.get(key) for shard in shards]
        if any(one != found[0] for one in found):
            raise ValueError(f"load_state_dict got shards of different {key}: {shown(found)}: pass shards of one save")


def changed_settings(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """In words, the settings that differ between the method now and the one that a state was saved with."""
    return [f"{key} was {theirs[key]} and is {value}" for key, value in ours.items() if theirs.get(key, value) != value]


def refuse(where: str, found: Any, allowed: str) -> NoReturn:
    raise ValueError(f"load_state_dict: {where} is {shown(found)}: it must be {allowed}")


def shown(value: Any) -> str:
    """What was found, short enough for an error."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, {value.layout}, on {value.device}"
    if isinstance(value, dict):
        return f"a dictionary of {', '.join(repr(str(key)) for key in list(value)[:6]) or 'nothing'}"
    text = repr(value)
    return f"{text if len(text) <= 200 else text[:200] + '...'} ({type(value).__name__})"
