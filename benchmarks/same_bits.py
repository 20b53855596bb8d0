"""Does a change leave what is computed as it was? Trains every method of the suite and compares digests.

    python benchmarks/same_bits.py            # against benchmarks/results/same_bits.json; exits with 1 if they differ
    python benchmarks/same_bits.py --write    # before a change, on the machine on which it will be compared

Each of thinwire's methods trains a small network for 50 steps on 3 ranks, with several buckets, with SGD and with
AdamW; Horovod's as well where Horovod is installed. A digest is of every rank's parameters and buffers, before and
after ``finalize()``, and of the bytes that ``stats()`` counts. Digests hold for one machine and one PyTorch: sums of
matrix products differ between processors.
"""
import argparse
import datetime
import hashlib
import json
import logging
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from suite.methods import CONTESTANTS, DDP
from torch import nn
from torch.nn.parallel import DistributedDataParallel

HERE = Path(__file__).resolve()
RANKS, STEPS = 3, 50
SEARCHED = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.002, betas=(0.0, 0.95)),
}


class Network(nn.Module):
    """An embedding, a convolution with BatchNorm, and layers wide enough to be sparsified; 33 000 parameters."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(96, 64)
        self.convolution = nn.Conv1d(8, 24, 3, padding=1)
        self.norm = nn.BatchNorm1d(24)
        self.wide, self.out = nn.Linear(24 * 8, 128), nn.Linear(128, 10)

    def forward(self, tokens):
        x = self.rows(tokens).view(-1, 8, 8)
        x = torch.relu(self.norm(self.convolution(x))).flatten(1)
        return self.out(torch.tanh(self.wide(x)))


def train(name: str, optimizer: str, rank: int, gather) -> str:
    """The digest of one method's run, the same on every rank."""
    contestant = CONTESTANTS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Network()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    called, handle = model, None
    if contestant.door == DDP:
        called = DistributedDataParallel(model, bucket_cap_mb=contestant.bucket_cap_mb or 0.05)
        handle = contestant.attach(called, optimizer)
    else:
        import horovod.torch as hvd

        handle = contestant.compression(list(model.named_parameters()))
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), compression=handle)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        tokens = torch.randint(96, (16, 1), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(called(tokens), tokens[:, 0] % 10).backward()
        optimizer.step()
    digest = hashlib.sha256()
    digest.update(_bytes(model))
    if hasattr(handle, "finalize"):
        handle.finalize()
    digest.update(_bytes(model))
    if hasattr(handle, "stats"):
        found = handle.stats()
        digest.update(repr([int(found[key]) for key in ("steps", "bytes_sent", "dense_bytes")]).encode())
    everyone = gather(digest.hexdigest())
    if hasattr(handle, "close"):
        handle.close()
    return hashlib.sha256("".join(everyone).encode()).hexdigest()[:16]


def _bytes(model):
    return b"".join(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                    for t in model.state_dict().values())  # fmt: skip


def chosen(door: str) -> list[tuple[str, str]]:
    """(method, optimizer) of all runs of thinwire's methods through this door."""
    names = [name for name, one in CONTESTANTS.items() if one.what and (one.door == DDP) == (door == DDP)]
    return [(name, optimizer) for name in names for optimizer in OPTIMIZERS]


def run_ddp(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    logging.getLogger("thinwire").setLevel(logging.ERROR)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)

    def gather(thing):
        everyone = [None] * RANKS
        dist.all_gather_object(everyone, thing)
        return everyone

    found = {f"{name}, {optimizer}": train(name, optimizer, rank, gather) for name, optimizer in chosen(DDP)}
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run_horovod(out: str) -> None:
    import horovod.torch as hvd

    torch.set_num_threads(1)
    hvd.init()
    found = {f"{name}, {optimizer}": train(name, optimizer, hvd.rank(), hvd.allgather_object)
             for name, optimizer in chosen("Horovod")}  # fmt: skip
    if hvd.rank() == 0:
        Path(out).write_text(json.dumps(found))


def digests() -> dict[str, str]:
    """Of all runs, by method and optimizer."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=run_ddp, args=(rank, f"{folder}/store", str(out))) for rank in range(RANKS)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        found |= json.loads(out.read_text())
        if launcher := shutil.which("horovodrun", path=SEARCHED):
            subprocess.run([launcher, "-np", str(RANKS), "--gloo", sys.executable, str(HERE), "--horovod", str(out)],
                           check=True, env=os.environ | {"PATH": SEARCHED}, stdout=subprocess.DEVNULL)  # fmt: skip
            found |= json.loads(out.read_text())
    return found


def about() -> dict[str, str]:
    """Where and of what digests are made."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True).stdout.strip()
    processor = f"{torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"
    return {"processor": processor, "torch": torch.__version__, "python": platform.python_version(),
            "date": datetime.date.today().isoformat(), "commit": commit}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the digests of the code as it is")
    parser.add_argument("--file", type=Path, default=HERE.parent / "results" / "same_bits.json")
    parser.add_argument("--horovod", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.horovod:
        run_horovod(options.horovod)
        return 0
    found = digests()
    if options.write:
        options.file.write_text(json.dumps({"about": about(), "digests": found}, indent=1) + "\n")
        print(f"{len(found)} digests in {options.file}")
        return 0
    kept = json.loads(options.file.read_text())
    wanted, changed = kept["digests"], {key: value for key, value in kept["about"].items() if about()[key] != value}
    if changed.keys() & {"processor", "torch"}:
        print(f"kept on another machine, so differences mean nothing: {changed}")
    if not shutil.which("horovodrun", path=SEARCHED):
        wanted = {name: digest for name, digest in wanted.items() if CONTESTANTS[name.split(",")[0]].door == DDP}
    differ = [name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
    for name in differ:
        print(f"{name}: was {wanted.get(name)}, is {found.get(name)}")
    print(f"{len(wanted.keys() - set(differ))} of {len(wanted)} runs give the same bits")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
