"""Asynchronous SGD in shared memory, with real worker processes."""
import functools
import itertools
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import thinwire.hogwild as hogwild
import torch
from thinwire.hogwild.shared import POINTS, Shared, Tally
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
SGD = functools.partial(torch.optim.SGD, lr=2.0**-4)
# Threads of PyTorch's that wait for one another waste the cores that the workers need.
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one():
    with hogwild.Workers(1) as workers:
        yield workers


@pytest.fixture(scope="module")
def two():
    with hogwild.Workers(2) as workers:
        yield workers


# ---- a loss with a constant gradient, in numbers of which float32 adds thousands without rounding ----


class Slope(nn.Module):
    """Calling it with a number gives the sum of its parameters times known slopes, times the number."""

    def __init__(self, elements=1024):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(elements))
        self.b = nn.Parameter(torch.zeros(4, elements // 8))
        slopes = torch.randint(1, 9, (elements + elements // 2,), generator=torch.Generator().manual_seed(0))
        self.of_a, self.of_b = slopes[:elements].float(), slopes[elements:].float().view(4, -1)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, batch):
        self.calls += 1
        return ((self.a * self.of_a).sum() + (self.b * self.of_b).sum()) * batch


def steps_made(model, report=None):
    """By how many whole steps each element has moved; with a report, what waits in the residuals included."""
    moved = {name: -p.detach() for name, p in model.named_parameters()}
    for name, values in (report.unsent if report else {}).items():
        moved[name] = moved[name] + values
    slopes = torch.cat([model.of_a, model.of_b.flatten()])
    return torch.cat([moved["a"], moved["b"].flatten()]) / slopes * 2**4


def assert_all_there(steps, updates, lost=5):
    """Additions are not atomic: of two workers that write at the same moment, one's may be lost. Seldom."""
    assert steps.max() <= updates and steps.mean() >= updates - lost


def call(model, batch):
    return model(batch)


def ones(worker, workers, count=None):
    return itertools.repeat(1.0) if count is None else itertools.repeat(1.0, count)


def test_what_is_written_and_what_waits_add_up_to_the_steps(one):
    for selection in ("topk", "independent"):
        model = Slope()
        report = hogwild.train(model, ones, call, optimizer=SGD, workers=one, updates=300, selection=selection,
                               density=0.1, memory="error_feedback", block_size=16)  # fmt: skip
        assert report.updates == 300 and report.stopped_by == "updates"
        assert any(values.any() for values in report.unsent.values())
        torch.testing.assert_close(steps_made(model, report), torch.full((1536,), 300.0), rtol=0, atol=0)


def test_without_memory_the_rest_is_forgotten(one):
    model = Slope()
    report = hogwild.train(model, ones, call, optimizer=SGD, workers=one, updates=50, density=0.25, memory="none",
                           block_size=16)  # fmt: skip
    steps = steps_made(model)
    assert report.unsent == {} and report.share == 0.25
    assert set(steps.tolist()) == {0.0, 50.0} and (steps == 50).sum() == 1536 / 4
    blocks = model.of_a.view(-1, 16).norm(dim=1)
    sent = steps[:1024].view(-1, 16)[:, 0] == 50
    assert blocks[sent].min() >= blocks[~sent].max()


def test_random_blocks_without_memory_are_unbiased(one):
    model = Slope()
    hogwild.train(model, ones, call, optimizer=SGD, workers=one, updates=200, selection="independent", density=0.25,
                  block_size=16)  # fmt: skip
    steps = steps_made(model)
    assert steps.mean() == 200  # exactly: a quarter of the blocks in every update, times four
    assert len(steps.unique()) > 5 and torch.all(steps % 4 == 0)


@pytest.mark.parametrize("options", [{}, {"density": 0.1, "block_size": 16}], ids=["dense", "sparse"])
def test_the_updates_of_two_workers_add_up(two, options):
    model = Slope()
    report = hogwild.train(model, ones, call, optimizer=SGD, workers=two, updates=2000, **options)
    assert report.updates == 2000
    assert_all_there(steps_made(model, report), 2000, lost=20)


# ---- against plain PyTorch ----


def network(dtype=torch.float32, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Dropout(dropout), nn.Linear(64, 5)).to(dtype)


def examples(worker, workers, count=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(worker)
    true = torch.randn(20, 5, generator=torch.Generator().manual_seed(99))
    for _ in itertools.count() if count is None else range(count):
        inputs = torch.randn(16, 20, generator=generator)
        yield inputs.to(dtype), (inputs @ true).argmax(1)


def entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("make", [
    functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    functools.partial(torch.optim.Adam, lr=0.01),
], ids=["sgd", "adam"])  # fmt: skip
def test_one_dense_worker_is_the_plain_loop(one, make):
    # To rounding, and not to the bit: x - (x - step(x)) is step(x) in exact arithmetic only.
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        model, plain = network(dtype), network(dtype)
        parameters = list(model.parameters())
        places = [p.data_ptr() for p in parameters]
        optimizer = make(plain.parameters())
        losses = []
        for batch in examples(0, 1, 60, dtype):
            optimizer.zero_grad()
            loss = entropy(plain, batch)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        report = hogwild.train(model, functools.partial(examples, count=60, dtype=dtype), entropy, optimizer=make,
                               workers=one)  # fmt: skip
        for ours, theirs in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert report.stopped_by == "batches" and report.updates == 60
        assert [number for number, _ in report.losses] == list(range(60))
        torch.testing.assert_close(torch.tensor([loss for _, loss in report.losses]), torch.tensor(losses))
        assert [p.data_ptr() for p in model.parameters()] == places  # an optimizer that holds them still does


def test_one_worker_repeats_itself_to_the_bit(one):
    def result(seed):
        model = network(dropout=0.5)
        hogwild.train(model, examples, entropy, optimizer=SGD, workers=one, updates=30, selection="independent",
                      density=0.5, block_size=8, seed=seed)  # fmt: skip
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = result(1)
    assert torch.equal(first, result(1))
    assert not torch.equal(first, result(2))


@pytest.mark.parametrize("options", [
    {}, {"density": 0.1}, {"density": 0.1, "memory": "none"}, {"selection": "independent", "density": None},
    {"selection": "independent", "density": 0.3, "memory": "error_feedback"},
], ids=str)  # fmt: skip
def test_two_workers_learn_and_stay_under_the_bound(two, options):
    model = network()
    report = hogwild.train(model, examples, entropy, optimizer=functools.partial(torch.optim.SGD, lr=0.1), workers=two,
                           updates=800, block_size=8, dense_below=0, consistency_every=5, **options)  # fmt: skip
    losses = [loss for _, loss in report.losses]
    assert sum(losses[-50:]) < 0.6 * sum(losses[:50])
    assert sum(report.delays.values()) == report.updates == 800
    assert report.max_delay == max(report.delays)
    assert 0 < report.inconsistency_mean <= report.inconsistency_max < report.bound
    assert report.updates_per_second == pytest.approx(800 / report.seconds)


# ---- delays and inconsistency, known beforehand ----


def call_when_others_are_done(model, batch):
    loss, folder = model(1.0), batch
    if folder is not None:
        (folder / "read").touch()
        while not (folder / "done").exists():
            time.sleep(0.005)
    return loss


def one_late_update(worker, workers, folder):
    """Worker 1 makes 5 updates when worker 0 has read; worker 0 makes one that waits for them."""
    if worker == 0:
        yield folder
        return
    while not (folder / "read").exists():
        time.sleep(0.005)
    yield from [None] * 5
    (folder / "done").touch()


def two_rates(parameters):
    return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 2.0**-6}], lr=2.0**-4)


@pytest.mark.parametrize("make", [SGD, two_rates], ids=["one rate", "two rates"])
@pytest.mark.parametrize("options", [{}, {"density": 0.1, "block_size": 16}], ids=["dense", "error feedback"])
def test_a_late_update_is_measured_as_late_as_it_is(two, tmp_path, make, options):
    model = Slope()
    report = hogwild.train(model, functools.partial(one_late_update, folder=tmp_path), call_when_others_are_done,
                           optimizer=make, workers=two, consistency_every=1, **options)  # fmt: skip
    slope = math.sqrt(float(model.of_a.square().sum() + model.of_b.square().sum()))
    assert report.delays == {0: 5, 5: 1} and report.max_delay == 5
    assert report.largest_step == pytest.approx(slope)
    # The ideal iterate has moved by five whole steps, whatever share of them was written.
    assert report.inconsistency_max == pytest.approx(5 * slope, rel=1e-5)
    assert report.inconsistency_max <= report.bound


def test_one_worker_is_never_late(one):
    report = hogwild.train(Slope(), ones, call, optimizer=SGD, workers=one, updates=20, consistency_every=1)
    assert report.delays == {0: 20} and report.max_delay == 0
    assert report.inconsistency_max == report.bound == 0.0
    quiet = hogwild.train(Slope(), ones, call, optimizer=SGD, workers=one, updates=20, consistency_every=0)
    assert quiet.inconsistency_max is quiet.inconsistency_mean is None


def test_a_loss_curve_of_any_length_is_kept_short():
    shared = Shared.around(torch.zeros(4), 1, with_residuals=False)
    tally = Tally(shared, 0)
    for number in range(20000):
        tally.begin()
        tally.end(number, 0, float(number), 1.0, 1.0)
    points = shared.losses()
    stride = points[0][0] + 1
    assert POINTS / 2 <= len(points) <= POINTS and 20000 / stride <= len(points) + 1
    for number, loss in points:
        assert (number + 1) % stride == 0 and loss == number - (stride - 1) / 2


# ---- what ends a run ----


def test_updates_seconds_and_batches_end_a_run(two):
    train = functools.partial(hogwild.train, Slope(), loss_fn=call, optimizer=SGD, workers=two)
    counted = train(make_batches=ones, updates=101)
    assert (counted.updates, counted.stopped_by) == (101, "updates")
    timed = train(make_batches=ones, seconds=0.4)
    assert timed.stopped_by == "seconds" and 0.4 <= timed.seconds < 3
    ended = train(make_batches=functools.partial(ones, count=30))
    assert (ended.updates, ended.stopped_by) == (60, "batches")


def ends_badly(worker, workers, way, folder=None):
    """Worker 1 comes to an end of some kind at its 20th batch."""
    if folder is not None:
        (folder / f"{worker}.pid").write_text(str(os.getpid()))
    for i in itertools.count():
        if worker == 1 and i == 20:
            way()
        if worker == 0 and i == 30 and folder is not None:
            (folder / "running").touch()
        yield 1.0


def raise_error():
    raise KeyError("no such digit")


def leave():
    os._exit(3)


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("way, message", [
    (raise_error, r"(?s)worker 1 raised.*in raise_error.*KeyError: 'no such digit'"),
    (sys.exit, r"(?s)worker 1 raised.*SystemExit"),
    (leave, r"worker 1 left with exit code 3"),
    (kill_this_process, r"worker 1 was killed by SIGKILL"),
], ids=["exception", "sys.exit", "os._exit", "killed"])  # fmt: skip
def test_a_worker_that_fails_ends_the_run_and_the_parameters_are_kept(way, message, tmp_path):
    model = Slope()
    begin = time.monotonic()
    with pytest.raises(hogwild.WorkerError, match=message) as caught:
        hogwild.train(model, functools.partial(ends_badly, way=way, folder=tmp_path), call, optimizer=SGD, workers=2)
    assert time.monotonic() - begin < 20
    report = caught.value.report
    assert caught.value.worker == 1 and report.stopped_by == "failed"
    assert report.updates >= 20 and f"after {report.updates} updates" in str(caught.value)
    assert_all_there(steps_made(model), report.updates)
    assert model.calls > 0  # the other worker was not killed: it ended by itself, and sent its buffers
    assert_gone([int(file.read_text()) for file in tmp_path.glob("*.pid")])


def test_workers_are_usable_again_after_a_failure(tmp_path):
    with hogwild.Workers(2) as workers:
        train = functools.partial(hogwild.train, loss_fn=call, optimizer=SGD, workers=workers)
        with pytest.raises(hogwild.WorkerError):
            train(Slope(), functools.partial(ends_badly, way=kill_this_process))
        assert train(Slope(), ones, updates=50).updates == 50
        with pytest.raises(hogwild.WorkerError, match=r"(?s)worker \d raised.*optimizer returned a dict"):
            train(Slope(), ones, optimizer=no_optimizer)
        batches = functools.partial(ends_badly, way=int, folder=tmp_path)
        train(Slope(), batches, updates=50)
        before = {file.read_text() for file in tmp_path.glob("*.pid")}
        train(Slope(), batches, updates=50)
        assert {file.read_text() for file in tmp_path.glob("*.pid")} == before  # the same processes
    assert_gone(map(int, before))


def no_optimizer(parameters):
    return {}


def stuck(worker, workers):
    yield 1.0
    if worker == 1:
        raise_error()
    time.sleep(600)


def test_a_worker_that_does_not_come_back_is_killed(monkeypatch):
    monkeypatch.setattr(hogwild.run, "_GRACE", 1.0)
    begin = time.monotonic()
    with pytest.raises(hogwild.WorkerError, match="no such digit"):
        hogwild.train(Slope(), stuck, call, optimizer=SGD, workers=2)
    assert time.monotonic() - begin < 15


_scripts = []


@pytest.fixture(autouse=True)
def no_script_is_left():
    yield
    while _scripts:
        process = _scripts.pop()
        if process.poll() is None:  # a test has failed
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_script(tmp_path, text, **env):
    script = tmp_path / "script.py"
    script.write_text(text)
    path = os.pathsep.join([str(ROOT / "tests"), str(Path(hogwild.__file__).parents[2])])
    command = [sys.executable, str(script), str(tmp_path)]
    process = subprocess.Popen(command, env=ALONE | {"PYTHONPATH": path} | env,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=_heed_ctrl_c)  # fmt: skip
    _scripts.append(process)
    return process


def _heed_ctrl_c():
    """Where the tests run in the background, Ctrl-C is ignored, and programs that they start would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


SCRIPT = """
import functools, json, pathlib, sys
import thinwire.hogwild as hogwild
from test_hogwild import SGD, Slope, call, ends_badly, steps_made

if __name__ == "__main__":
    model = Slope()
    batches = functools.partial(ends_badly, way=int, folder=pathlib.Path(sys.argv[1]))
    try:
        hogwild.train(model, batches, call, optimizer=SGD, workers=2)
    except KeyboardInterrupt as interrupt:
        print(json.dumps([interrupt.report.stopped_by, interrupt.report.updates, steps_made(model).tolist(),
                          model.calls.item()]))
"""


def started(tmp_path):
    """A script in the middle of an endless run, in a process group of its own."""
    process = run_script(tmp_path, SCRIPT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "running").exists() or len(list(tmp_path.glob("*.pid"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process, [int(file.read_text()) for file in tmp_path.glob("*.pid")]


def assert_gone(pids):
    deadline = time.monotonic() + 10
    for pid in pids:
        while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline, f"process {pid} is left"
            time.sleep(0.02)


def test_ctrl_c_ends_the_run_and_the_parameters_are_kept(tmp_path):
    process, pids = started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    stopped_by, updates, steps, calls = json.loads(output)
    assert stopped_by == "interrupted" and updates >= 30
    assert calls >= 30  # worker 0 was not interrupted itself: it ended when it was told to, and sent its buffers
    assert_all_there(torch.tensor(steps), updates)
    assert f"interrupted after {updates} updates" in errors
    assert_gone(pids)


def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path):
    process, pids = started(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert_gone(pids)


# ---- gradients that are not finite ----


def some_not_finite(worker, workers, bad, count):
    for i in range(count):
        yield bad if i % 3 == 1 else 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**120], ids=["nan", "inf", "large step"])
def test_an_update_that_is_not_finite_is_dropped_and_nothing_keeps_it(one, bad):
    for options in ({"density": 0.25, "memory": "error_feedback"}, {"density": 0.25, "memory": "none"}, {}):
        if bad == 2.0**120 and options.get("memory") != "error_feedback":
            continue  # of use to a memory only; without one it is an update like any other
        model = Slope()
        report = hogwild.train(model, functools.partial(some_not_finite, bad=bad, count=30), call, workers=one,
                               optimizer=SGD, block_size=16, **options)  # fmt: skip
        assert (report.updates, report.dropped) == (20, 10)
        steps = steps_made(model, report)
        if options.get("memory") == "none":
            steps = steps[steps != 0]
        torch.testing.assert_close(steps, torch.full_like(steps, 20.0), rtol=0, atol=0)


def half_too_large(model, batch):
    """A step that the memory can take in the second parameter, and not in the first."""
    return (model.a.sum() * 2.0**90 if batch != 1.0 else model.a.sum()) + model.b.sum()


def test_a_dropped_step_leaves_the_residual_to_rounding(one):
    model = Slope()
    report = hogwild.train(model, functools.partial(some_not_finite, bad=2.0, count=30), half_too_large,
                           workers=one, optimizer=SGD, density=0.25, block_size=16)  # fmt: skip
    assert (report.updates, report.dropped) == (20, 10)
    for name, p in model.named_parameters():
        torch.testing.assert_close(report.unsent[name] - p.detach(), torch.full_like(p, 20 * 2.0**-4))


def test_an_optimizer_keeps_nothing_of_a_dropped_gradient(one):
    momentum = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    model, plain = Slope(), Slope()
    hogwild.train(model, functools.partial(some_not_finite, bad=math.nan, count=30), call, workers=one,
                  optimizer=momentum)  # fmt: skip
    hogwild.train(plain, functools.partial(ones, count=20), call, workers=one, optimizer=momentum)
    assert torch.equal(model.a, plain.a) and plain.a.any()


# ---- what is the worker's own, and what the caller's ----


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.first, self.tied = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.register_buffer("worker", torch.tensor(-1))

    def forward(self, batch):
        worker, inputs = batch
        self.worker.fill_(worker)
        return self.tied(self.first(self.frozen(self.norm(inputs)))).square().mean()


def normal_inputs(worker, workers):
    assert torch.get_num_threads() == 1
    for _ in range(10 * (worker + 1)):
        yield worker, torch.randn(8, 6) + 3


def test_buffers_of_the_first_worker_come_back(two):
    model = WithBuffers()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = hogwild.train(model, normal_inputs, call, optimizer=SGD, workers=two)
    assert report.updates == 30
    assert model.worker == 0 and model.norm.num_batches_tracked == 10
    assert model.norm.running_mean.mean() == pytest.approx(3 * (1 - 0.9**10), rel=0.1)
    assert model.tied.weight is model.first.weight
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name


def random_numbers(worker, workers, folder):
    numbers = [torch.rand(()).item(), random.random(), np.random.random()]  # noqa: NPY002
    (folder / str(worker)).write_text(json.dumps(numbers))
    return [1.0]


def test_random_numbers_are_the_workers_own_and_the_callers_stay(two, tmp_path):
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    train = functools.partial(hogwild.train, Slope(), functools.partial(random_numbers, folder=tmp_path), call,
                              optimizer=SGD, workers=two, selection="independent", density=0.5)  # fmt: skip
    train()
    drawn = [json.loads((tmp_path / str(worker)).read_text()) for worker in range(2)]
    assert all(a != b for a, b in zip(*drawn))
    train()
    assert drawn == [json.loads((tmp_path / str(worker)).read_text()) for worker in range(2)]
    train(seed=1)
    assert drawn[0] != json.loads((tmp_path / "0").read_text())
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert before[2] == pickle.dumps(np.random.get_state())  # noqa: NPY002


# ---- what is refused ----


@pytest.mark.parametrize("change, error, message", [
    ({"workers": 0}, ValueError, r"train\(workers=0\).*at least 1"),
    ({"workers": 1.5}, TypeError, r"train\(workers=1\.5\)"),
    ({"workers": True}, TypeError, r"train\(workers=True\)"),
    ({"workers": hogwild.Workers(2), "threads": 3}, ValueError, r"threads=3.*started with threads=1"),
    ({"threads": 0}, ValueError, r"threads=0"),
    ({"selection": "nominated"}, ValueError, r"selection='nominated'.*'topk' or 'independent'"),
    ({"memory": "control_variate"}, ValueError, r"memory='control_variate'.*'error_feedback'"),
    ({"density": 0.0}, ValueError, r"density=0\.0"),
    ({"density": 1.5}, ValueError, r"density=1\.5"),
    ({"block_size": 0}, ValueError, r"block_size=0"),
    ({"seed": -1}, ValueError, r"seed=-1"),
    ({"updates": 0}, ValueError, r"updates=0"),
    ({"updates": 10.0}, TypeError, r"updates=10\.0"),
    ({"seconds": 0}, ValueError, r"seconds=0\)"),
    ({"seconds": math.inf}, ValueError, r"seconds=inf.*None for no limit"),
    ({"seconds": "9"}, TypeError, r"seconds='9'"),
    ({"consistency_every": -1}, ValueError, r"consistency_every=-1"),
    ({"model": call}, TypeError, r"got a function: it must be a torch.nn.Module"),
    ({"model": nn.ReLU()}, ValueError, r"model=ReLU.*no parameters"),
    ({"model": nn.Linear(2, 2).bfloat16()}, TypeError, r"'weight' is torch.bfloat16"),
    ({"model": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())}, TypeError, r"'1.weight' is torch.float64"),
    ({"model": nn.Linear(2, 2, device="meta")}, ValueError, r"is on meta.*model\.cpu\(\)"),
    ({"optimizer": torch.optim.Adam([nn.Parameter(torch.ones(1))])}, TypeError, r"functools.partial\(torch.optim.Adam"),
    ({"optimizer": "sgd"}, TypeError, r"optimizer=\.\.\.\) got a str"),
    ({"loss_fn": lambda model, batch: model(batch)}, TypeError, r"loss_fn=.*<lambda>.*top level of a module"),
    ({"make_batches": [1.0]}, TypeError, r"make_batches=\.\.\.\) got a list"),
], ids=lambda value: ",".join(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_starts(change, error, message, monkeypatch):
    monkeypatch.setattr(hogwild.Workers, "_start", lambda self: pytest.fail("processes were started"))
    arguments = {"model": Slope(), "make_batches": ones, "loss_fn": call, "optimizer": SGD, "workers": 1}
    with pytest.raises(error, match=message):
        hogwild.train(**(arguments | change))


def test_a_script_without_its_guard_is_told_so(tmp_path):
    process = run_script(tmp_path, SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and 'under if __name__ == "__main__":' in errors


# ---- without compiled operators ----

PLAIN = """
import thinwire
import thinwire.hogwild as hogwild
from test_hogwild import SGD, Slope, assert_all_there, call, ones, steps_made

if __name__ == "__main__":
    assert not thinwire.ops.native("cpu")
    with hogwild.Workers(2) as workers:
        for density in (1.0, 0.25):
            model = Slope(2**16)  # so large that a write takes a good part of an update
            report = hogwild.train(model, ones, call, optimizer=SGD, workers=workers, updates=100, density=density)
            assert_all_there(steps_made(model, report), 100, lost=0.5)
"""


@pytest.mark.full
def test_the_updates_of_two_workers_add_up_without_compiled_operators(tmp_path):
    process = run_script(tmp_path, PLAIN, THINWIRE_REFERENCE="1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


# ---- the example ----


def test_the_example_learns_with_one_process_and_with_two():
    output = subprocess.run([sys.executable, "examples/hogwild_digits.py", "--updates", "400"], cwd=ROOT, text=True,
                            env=ALONE, capture_output=True, check=True, timeout=120).stdout  # fmt: skip
    found = re.findall(r"accuracy ([\d.]+)", output)
    assert len(found) == 2 and min(map(float, found)) > 0.9, output


@pytest.mark.full
def test_the_error_feedback_benchmark_measures_every_method(tmp_path):
    subprocess.run([sys.executable, "benchmarks/elastic/error_feedback.py", "--workers", "2", "--rates", "0.1", "0.2",
                    "--seeds", "2", "--updates", "30", "--out", str(tmp_path)], cwd=ROOT, check=True,
                   env=ALONE, capture_output=True, timeout=120)  # fmt: skip
    record = json.loads((tmp_path / "elastic_error_feedback.json").read_text())
    assert (tmp_path / "elastic_error_feedback.png").read_bytes().startswith(b"\x89PNG")
    cases = {(row["workers"], row["method"], row["lr"], row["seed"]) for row in record["rows"]}
    assert len(cases) == len(record["rows"]) == 5 * 2 * 2
    for row in record["rows"]:
        assert row["inconsistency_max"] <= row["bound"] and 0.0 <= row["accuracy"] <= 1.0
        share = {"dense": 1.0, "10 %": 0.1, "1 %": 0.0128}[row["method"].split(",")[0]]
        assert row["share"] == pytest.approx(share, abs=0.002)
