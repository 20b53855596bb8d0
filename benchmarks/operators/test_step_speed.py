"""A step on the demo's network against no exchange at all and against PowerSGD, in turns within one run.

    python -m pytest benchmarks/operators/test_step_speed.py --benchmark-only -s
"""
import json
import sys
from pathlib import Path

import pytest
from common.ranks import import_paths
from thinnet import ThinNet

from operators.step_rank import OURS

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
        assert net.run([sys.executable, str(script)], env=import_paths(), on_line=take) == 0
    return found


def compare(benchmark, *comparisons):
    """comparisons: (what, ours, against, theirs, unit, target of ours / theirs)."""
    keys = ("what", "ours", "against", "theirs", "unit", "target")
    rows = [dict(zip(keys, one)) for one in comparisons]
    for row in rows:
        row["ratio"] = row["ours"] / row["theirs"]
        print("\n{what}: {ours:.3g} {unit} against {against}: {theirs:.3g} {unit}, ratio {ratio:.3f}, "
              "target {target}".format(**row))  # fmt: skip
    benchmark.extra_info["comparisons"] = rows
    return [row["ratio"] for row in rows]


@pytest.mark.parametrize("method", OURS)
def test_step(benchmark, rows, method):
    benchmark.pedantic(lambda: None)  # the timing is the ranks' own
    ours, noop, powersgd = (rows[name] for name in (method, "noop", "powersgd"))
    benchmark.extra_info.update({key: ours[key] for key in ("quartiles_ms", "encode_s", "exchange_s", "decode_s")})
    over_noop, _ = compare(
        benchmark,
        (f"a step, {method} 1 %", ours["median_ms"], "no exchange", noop["median_ms"], "ms", 1.25),
        (f"a step, {method} 1 %", ours["median_ms"], "PowerSGD rank 1", powersgd["median_ms"], "ms", 1.0),
    )
    assert over_noop < 2


@pytest.mark.parametrize("method", OURS)
def test_bytes(benchmark, rows, method):
    """What estimate() says is the most: ranks that name the same block send it once."""
    benchmark.pedantic(lambda: None)
    ours = rows[method]
    measured, _ = compare(
        benchmark,
        (f"bytes a step, {method} 1 %", ours["interface"] / 1e3, "stats()", ours["stats"] / 1e3, "kB", 1.1),
        (f"stats(), {method} 1 %", ours["stats"] / 1e3, "estimate()", ours["estimate"] / 1e3, "kB", 1.0),
    )
    assert 1.0 <= measured < 1.2
