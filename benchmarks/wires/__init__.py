"""The loss against the wire: what few bits a value do to training."""
