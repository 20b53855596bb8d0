"""The scripts that a person runs first: the examples, and a short demo."""
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import thinwire
from common.task import ByteTransformer
from demo import run as demo
from demo.rank import CONTESTANTS
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")  # which takes a free port


def run(*command, timeout=900):
    """What a command printed, standard error included; it must succeed."""
    package = str(Path(importlib.util.find_spec("thinwire").origin).parent.parent)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": package, "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: a thin network removes what it made
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"still running after {timeout} s:\n{output}")
    assert process.returncode == 0, output
    return output


def accuracy(output):
    return float(re.search(r"accuracy ([\d.]+)", output)[1])


def compression(output):
    return float(re.search(r"([\d.]+) times fewer", output)[1])


def check_bytes_of_the_ddp_example(output, ranks):
    model = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 10))
    most = thinwire.estimate(thinwire.BlockSparse("nominated", density=0.05), model, ranks)["bytes_sent"]
    sent = int(re.search(r"(\d+) bytes sent a step", output)[1])
    assert 0.8 * most < sent <= most, "ranks that name the same block send it once"


def test_the_ddp_example_learns_at_a_fraction_of_the_bytes():
    output = run(*TORCHRUN, "--nproc-per-node", 2, "examples/ddp.py", "--steps", 120)
    assert accuracy(output) > 0.9
    assert compression(output) > 15
    check_bytes_of_the_ddp_example(output, 2)


@pytest.mark.full
def test_the_ddp_example_runs_on_a_thin_network():
    output = run(sys.executable, "benchmarks/thinnet.py", "--ranks", 2, "--mbit", 50, "--", sys.executable,
                 "examples/ddp.py", "--steps", 50)  # fmt: skip
    assert "[0] accuracy" in output
    check_bytes_of_the_ddp_example(output, 2)


@pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod is not installed: make horovod")
def test_the_horovod_example_learns_at_a_fraction_of_the_bytes():
    horovodrun = Path(sys.executable).with_name("horovodrun")
    output = run(horovodrun, "-np", 2, "--gloo", sys.executable, "examples/horovod_digits.py")
    assert accuracy(output) > 0.9
    assert compression(output) > 15


def test_the_shuffle_example_learns_and_averages_weights():
    output = run(*TORCHRUN, "--nproc-per-node", 2, "examples/shuffle_swa.py")
    assert accuracy(output) > 0.93
    assert float(re.search(r"([\d.]+) over replicas,", output)[1]) > 0.93


def test_each_example_differs_from_plain_training_by_one_line():
    for name in ("ddp.py", "horovod_digits.py", "shuffle_swa.py"):
        lines = (ROOT / "examples" / name).read_text().splitlines()
        assert len(lines) < 70
        assert sum("# the one line" in line for line in lines) == 1


def test_a_short_demo_leaves_its_record_and_picture(tmp_path):
    run(sys.executable, "benchmarks/demo/run.py", "--seconds", 3, "--ranks", 2, "--mbit", 200, "--methods", "dense",
        "nominated-4", "--out", tmp_path)  # fmt: skip
    record = json.loads((tmp_path / "demo.json").read_text())
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert record["ranks"] == 2 and list(record["methods"]) == ["dense", "nominated-4"]
    for result in record["methods"].values():
        assert result["status"] == "done"
        assert result["seconds"] > 0
        assert result["curve"][0][2] == pytest.approx(5.6, abs=0.3)  # both start from the same model, knowing nothing
        assert result["curve"][-1][2] < result["curve"][0][2]
        assert len(result["all_step_ms"]) == result["steps"] == result["curve"][-1][1]
    dense, ours = record["methods"]["dense"], record["methods"]["nominated-4"]
    method = CONTESTANTS["nominated-4"].method
    estimate = lambda step: thinwire.estimate(method, ByteTransformer(), 2, step)["bytes_sent"]
    most = sum(estimate(step) for step in range(ours["steps"]))
    assert 0.8 * most < ours["stats_bytes"] <= most
    if record["shaped"]:
        ring = 4 * dense["parameters"]  # two ranks: 2 (n - 1) / n = 1 time the gradient
        assert dense["step_bytes"] == pytest.approx(ring, rel=0.1)
        assert ours["bytes"] == pytest.approx(ours["stats_bytes"], rel=0.1)
    cells = demo.rows_of(record)
    assert [row[0] for row in cells] == [CONTESTANTS["dense"].label, CONTESTANTS["nominated-4"].label]
