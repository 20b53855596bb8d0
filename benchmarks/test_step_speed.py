"""A step on the demo's network against no exchange at all and against PowerSGD, in turns within one run.

    python -m pytest benchmarks/test_step_speed.py --benchmark-only -s
"""
import json
import sys
from pathlib import Path

import pytest
from step_rank import OURS
from thinnet import ThinNet

RANKS, MBIT = 4, 100


@pytest.fixture(scope="module")
def rows():
    found = {}

    def take(rank, line, stream):
        if line.startswith("RESULT "):
            row = json.loads(line.removeprefix("RESULT "))
            found[row["method"]] = row

    with ThinNet(ranks=RANKS, mbit=MBIT) as net:
        if not net.shaped:
            pytest.skip(f"the network cannot be shaped here: {net.why}")
        script = Path(__file__).with_name("step_rank.py")
        assert net.run([sys.executable, str(script)], on_line=take) == 0
    return found


def report(benchmark, **figures):
    benchmark.extra_info.update(figures)
    print("\n" + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))


@pytest.mark.parametrize("method", OURS)
def test_nominated_step(benchmark, rows, method):
    benchmark.pedantic(lambda: None)  # the timing is the ranks' own
    ours, noop, powersgd = (rows[name] for name in (method, "noop", "powersgd"))
    report(
        benchmark,
        nominated_ms=ours["median_ms"], noop_ms=noop["median_ms"], powersgd_ms=powersgd["median_ms"],
        over_noop=ours["median_ms"] / noop["median_ms"], over_noop_target=1.25,
        over_powersgd=ours["median_ms"] / powersgd["median_ms"], over_powersgd_target=1.0,
        encode_ms=ours["encode_s"], exchange_ms=ours["exchange_s"], decode_ms=ours["decode_s"],
    )  # fmt: skip
    assert ours["median_ms"] < 2 * noop["median_ms"]


@pytest.mark.parametrize("method", OURS)
def test_bytes(benchmark, rows, method):
    benchmark.pedantic(lambda: None)
    ours = rows[method]
    report(
        benchmark,
        interface=ours["interface"], stats=ours["stats"], estimate=ours["estimate"],
        interface_over_stats=ours["interface"] / ours["stats"], stats_over_estimate=ours["stats"] / ours["estimate"],
    )  # fmt: skip
    assert 0.9 < ours["interface"] / ours["stats"] < 1.2
