"""A step over a thin network: every wire against no exchange and against plain DDP."""
