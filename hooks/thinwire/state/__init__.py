"""What every front door shows its user: the handle, its state, and what is refused before training starts."""
