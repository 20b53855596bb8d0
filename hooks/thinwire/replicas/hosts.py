"""Which ranks share a host."""

import os
import socket

# Set by Horovod's launcher, torchrun and Slurm: the node's name, or number. Slurm's last, because a launcher inside a
# Slurm job may hand its own to all ranks.
_VARIABLES = ("HOROVOD_HOSTNAME", "GROUP_RANK", "SLURM_NODEID")


def mine() -> str:
    """This rank's host: equal on ranks of one host, different on ranks of two."""
    return next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), socket.gethostname())
