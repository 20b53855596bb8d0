"""Horovod itself, where it is installed."""

try:
    import horovod.torch as hvd
except ImportError as error:
    hvd, _why_not = None, error


def require() -> None:
    """Raise ImportError, with the reason, where Horovod does not import."""
    if hvd is None:
        raise ImportError(f"thinwire.horovod needs horovod.torch, which does not import here: {_why_not}")
