"""Do all ranks run the same thing? Asked once, before the first payload: a mismatch later would hang or corrupt."""

import hashlib
from collections.abc import Callable
from typing import Any

from thinwire.methods import Method

_ADVICE = "every rank must be given the same method, the same model and, after a resume, a state of the same step"


def describe(method: Method, step: int, numels: dict[str, int]) -> dict[str, str]:
    """What must be equal on every rank, by name."""
    return method.describe() | {"model": digest(numels), "step": str(step)}


def digest(numels: dict[str, int]) -> str:
    """A model's parameters, by name and size, in one line."""
    return f"{len(numels)} parameters, {sum(numels.values())} elements, digest {digest_of(numels)}"


def digest_of(items: dict) -> str:
    """A dictionary in twelve letters."""
    return hashlib.blake2b(repr(sorted(items.items())).encode(), digest_size=6).hexdigest()


def require(everyone: list[dict[str, str]]) -> None:
    """Raise ValueError, naming each thing in which the ranks' descriptions differ and who has what."""
    differences = []
    for key in sorted({key for one in everyone for key in one}):
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(everyone):
            ranks.setdefault(one.get(key, "(none)"), []).append(rank)
        if len(ranks) > 1:
            found = ", ".join(f"{value} on rank {','.join(map(str, who))}" for value, who in ranks.items())
            differences.append(f"{key}: {found}")
    if differences:
        raise ValueError(f"thinwire: the ranks differ in {'; '.join(differences)}. {_ADVICE.capitalize()}.")


def check_together(all_gather_object: Callable[[Any], list], check: Callable[[], dict[str, str]],
                   aside: Any = None) -> list:  # fmt: skip
    """Run a check on every rank and compare what it gives; what it raises on one rank is raised on all.

    check: gives what must be equal on every rank, by name, or raises. aside: what this rank
    has to say besides, which may differ. Returns what each rank said aside. Raises ValueError, or TypeError where that
    is all that any rank raised.
    """
    says, refusal, kind = {}, "", ""
    try:
        says = check()
    except Exception as error:  # whatever it is, the others must not wait for this rank
        refusal = str(error) if isinstance(error, (TypeError, ValueError)) and str(error) else repr(error)
        kind = "type" if isinstance(error, TypeError) else "value"
    everyone = all_gather_object((refusal, kind, says, aside))
    refusals: dict[str, list[str]] = {}
    for rank, (refused, *_) in enumerate(everyone):
        if refused:
            refusals.setdefault(refused, []).append(str(rank))
    if refusals:
        raised = TypeError if {kind for _, kind, *_ in everyone} <= {"", "type"} else ValueError
        raise raised("; ".join(f"{what} (rank {', '.join(ranks)})" for what, ranks in refusals.items()))
    require([said for *_, said, _ in everyone])
    return [aside for *_, aside in everyone]
