import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """ranks(n): a process group of n ranks, kept for the whole session."""
    groups = {}
    yield lambda n: groups.setdefault(n, Ranks(n))
    for group in groups.values():
        group.stop()
