"""``make demo``: one real model over thin links, a few methods, a few minutes."""
