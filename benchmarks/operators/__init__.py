"""``make bench``: the operators and a whole step, each against what it competes with."""
