"""``make bench-full``: tasks, methods, which runs there are, where results are kept, and what they add up to."""
