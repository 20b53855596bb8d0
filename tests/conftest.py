import pytest
import torch
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """ranks(n): a process group of n ranks, kept for the whole session."""
    groups = {}
    yield lambda n: groups.setdefault(n, Ranks(n))
    for group in groups.values():
        group.stop()


@pytest.fixture
def one_thread():
    """PyTorch computes on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
