"""The Horovod compressors in every combination, on simulated ranks; test_horovod.py has real Horovod run some."""

import horovod_checks
import pytest
from horovod_checks import CHECKS
from simulated_horovod import World

SIMULATED = [(n, name) for name, check in CHECKS.items() for n in check.ranks if check.simulated]


@pytest.mark.skipif(horovod_checks.hvd is None, reason="Horovod is not installed: 'make horovod' builds it")
@pytest.mark.parametrize(("n", "check"), SIMULATED)
def test_on_ranks(n, check, one_thread, monkeypatch):
    world = World(n, [(0, 2)] if n == 3 else [])
    monkeypatch.setattr(horovod_checks, "SIMULATED", True)
    monkeypatch.setattr(horovod_checks, "PAIR", world.process_sets[0] if n == 3 else None)
    errors = world.run(CHECKS[check].function)
    assert not any(errors), "\n".join(f"rank {rank}:\n{error}" for rank, error in enumerate(errors) if error)
