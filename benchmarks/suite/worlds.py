"""How the ranks of a run reach each other beside the gradients: through torch.distributed or through Horovod."""
import ctypes
import datetime
import fcntl
import os
import socket
import struct

import torch
import torch.distributed as dist


class Gloo:
    """torch.distributed, as DDP uses it."""

    def __init__(self, timeout_s: float):
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
        self.rank, self.n = dist.get_rank(), dist.get_world_size()

    def barrier(self) -> None:
        dist.barrier()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(value)
        return value

    def gather(self, thing) -> list:
        everyone = [None] * self.n
        dist.all_gather_object(everyone, thing)
        return everyone


class Horovod:
    """Horovod on Gloo, one rank a machine, without its launcher: the thin network starts the ranks."""

    def __init__(self, timeout_s: float):
        self.rank, self.n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(address, port, self.n, self.rank == 0, datetime.timedelta(seconds=timeout_s))
        if self.rank == 0:
            self._store.set("port", str(self._serve()))
        os.environ.update({
            "HOROVOD_RANK": str(self.rank), "HOROVOD_SIZE": str(self.n), "HOROVOD_LOCAL_RANK": "0",
            "HOROVOD_LOCAL_SIZE": "1", "HOROVOD_CROSS_RANK": str(self.rank), "HOROVOD_CROSS_SIZE": str(self.n),
            "HOROVOD_HOSTNAME": f"rank{self.rank}", "HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_IFACE": os.environ["GLOO_SOCKET_IFNAME"], "HOROVOD_GLOO_RENDEZVOUS_ADDR": address,
            "HOROVOD_GLOO_RENDEZVOUS_PORT": self._store.get("port").decode(),
        })  # fmt: skip
        _be_called_by_address(os.environ["GLOO_SOCKET_IFNAME"])
        import horovod.torch as hvd

        hvd.init()
        self._hvd = hvd

    def _serve(self):
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.http.http_server import RendezvousServer

        self._server = RendezvousServer(verbose=0)
        port = self._server.start()
        hosts = ",".join(f"rank{rank}:1" for rank in range(self.n))
        self._server.init(get_host_assignments(parse_hosts(hosts), self.n))
        return port

    def barrier(self) -> None:
        self._hvd.barrier()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return self._hvd.allreduce(value, op=self._hvd.Sum)

    def gather(self, thing) -> list:
        return self._hvd.allgather_object(thing)


def _be_called_by_address(interface):
    """Give this process a host name of its own: its address, without which Horovod 0.28.1 listens on the loopback.

    For its process sets it forgets the interface that it was told and looks up the host's name, and all namespaces
    of this machine have the same. Where the ranks share the loopback there is nothing to do, nor the right to do it.
    """
    if interface == "lo":
        return
    new_uts = 0x04000000
    if ctypes.CDLL(None, use_errno=True).unshare(new_uts):
        raise OSError(ctypes.get_errno(), "no host name of one's own: " + os.strerror(ctypes.get_errno()))
    get_address = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, get_address, struct.pack("256s", interface.encode()))
    socket.sethostname(socket.inet_ntoa(answer[20:24]))
