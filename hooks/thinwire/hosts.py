"""Which ranks share a host."""

import os
import socket

# Set by torchrun, Slurm and Horovod's launcher: the node's number, or name.
_VARIABLES = ("GROUP_RANK", "SLURM_NODEID", "HOROVOD_HOSTNAME")


def mine() -> str:
    """This rank's host: equal on ranks of one host, different on ranks of two."""
    return next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), socket.gethostname())
