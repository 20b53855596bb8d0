"""A model's parameters in fragments of about as many elements, which take turns to be sent (2501.18512)."""

from thinwire.replicas.means import Named


def fragments_of(parameters: list[Named], count: int) -> list[list[Named]]:
    """So many, none of them empty; fewer where there are fewer parameters. Sizes alone decide, so all ranks agree."""
    count = max(1, min(count, len(parameters)))
    filled, of = [0] * count, {}
    for name, p in sorted(parameters, key=lambda named: -named[1].numel()):
        of[name] = filled.index(min(filled))
        filled[of[name]] += max(1, p.numel())
    return [[(name, p) for name, p in parameters if of[name] == i] for i in range(count)]
