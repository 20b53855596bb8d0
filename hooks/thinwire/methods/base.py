"""What every method is: a frozen value, validated where it is made, compared across ranks in step one."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from thinwire.methods.block_sparse import BlockSparse, Dense

WIRE_DTYPES: tuple = (torch.float32, torch.bfloat16, torch.float16, "int8", "int4", "int2")


@dataclass(frozen=True)
class Method:
    """Base of every method. Methods hold no tensors; what runs them holds the state."""

    def describe(self) -> dict[str, str]:
        """Field names and values as strings: what must be equal on every rank, and what a checkpoint records."""
        return {"method": type(self).__name__} | {f.name: str(getattr(self, f.name)) for f in fields(self)}

    @property
    def of_backend(self) -> bool:
        """Whether the backend's own all-reduce does what this asks for."""
        return False

    def as_block_sparse(self) -> "BlockSparse":
        """The method as the reducer runs it. Raises TypeError where a reducer alone cannot run it."""
        raise TypeError(f"method is {self!r}: it is no method that averages gradients")


def check_one_of(method: Method, name: str, allowed: Iterable) -> None:
    value = getattr(method, name)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), map(str, allowed), n=1)
        raise ValueError(
            f"{given(method, name)}: {name} must be one of {', '.join(map(repr, allowed))}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )


def check_wire_dtype(method: "BlockSparse | Dense") -> None:
    dtype = method.wire_dtype
    if not isinstance(dtype, (str, torch.dtype)) or dtype not in WIRE_DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{given(method, 'wire_dtype')}: wire_dtype must be one of "
            + ", ".join(str(one) if isinstance(one, torch.dtype) else repr(one) for one in WIRE_DTYPES)
            + (f"; did you mean {name!r}?" if name in WIRE_DTYPES else "")
        )
    if isinstance(dtype, str) and method.memory == "none":
        raise ValueError(
            f"{type(method).__name__}(wire_dtype={dtype!r}, memory='none'): what {dtype} rounds off would be lost in "
            f"every step, so it needs a memory that keeps it: memory='error_feedback'"
            + (" or 'control_variate'" if getattr(method, "unbiased", False) else "")
        )


def check_number(method: Method, name: str, allowed: str, is_allowed: Callable[[Any], bool]) -> None:
    value = getattr(method, name)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{given(method, name)}: {name} must be {allowed}")
    if not is_allowed(value):  # false for nan too
        raise ValueError(f"{given(method, name)}: {name} must be {allowed}")


def check_integer(method: Method, name: str, least: int, below: int | None = None) -> None:
    value = getattr(method, name)
    allowed = f"an integer of at least {least}" + (f" and below {below}" if below else "")
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{given(method, name)}: {name} must be {allowed}")
    if value < least or (below is not None and value >= below):  # type: ignore[operator]  # Integral has no order there
        raise ValueError(f"{given(method, name)}: {name} must be {allowed}")


def check_count(caller: str, name: str, value: Any, least: int) -> None:
    """Raise TypeError or ValueError where an argument of a function is no integer of at least ``least``."""
    what = f"{caller}({name}={value!r}): {name} must be an integer of at least {least}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(what)
    if value < least:
        raise ValueError(what)


def given(method: Method, name: str) -> str:
    return f"{type(method).__name__}({name}={getattr(method, name)!r})"
