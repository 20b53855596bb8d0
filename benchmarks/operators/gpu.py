"""make gpu: builds thinwire with its CUDA operators, tests them and the hooks on the GPU, and measures both.

    make gpu                                        all of it, in under nine minutes
    python benchmarks/operators/gpu.py --only build tests

It needs torch with CUDA, nvcc and pytest with hypothesis; what else is missing is left out and said. Figures go into
results/bench_gpu.json, from there into benchmarks/results/bench.json and the tables of docs/. Without a GPU the half
that a CPU can do runs: the kernels' logic, emulated, and the measuring code on small sizes; nothing committed changes.
"""
import argparse
import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 540  # for all on a GPU; what has not begun by then is left out
WITHOUT_GPU = 3600  # the emulation's time depends on the CPU, and nothing else does
STEP_TARGET = 1.15  # of a step with a hook over one without


class Run:
    """What was done, with what result and how long it took."""

    def __init__(self, seconds):
        self.begin, self.seconds, self.failed, self.log = time.monotonic(), seconds, [], []

    def left(self):
        return self.seconds - (time.monotonic() - self.begin)

    def do(self, what, command, most, environment=(), may_fail=False):
        """Run a command for so many seconds at most, or those that are left. Returns whether it succeeded."""
        most = min(most, self.left())
        if most < 5:
            self.note(what, "left out: no time")
            self.failed.append(what)
            return False
        paths = os.pathsep.join([str(ROOT / "hooks"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        print(f"--- {what}: {' '.join(map(str, command))}", flush=True)
        begin = time.monotonic()
        try:
            code = subprocess.run(list(map(str, command)), cwd=ROOT, timeout=most,
                                  env={**os.environ, "PYTHONPATH": paths, **dict(environment)}).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = "no end in time"
        result = "passed" if code == 0 else f"failed ({code})"
        self.note(what, f"{result}, {time.monotonic() - begin:.0f} s")
        if code != 0 and not may_fail:
            self.failed.append(what)
        return code == 0

    def note(self, what, result):
        self.log.append(f"{what}: {result}")
        print(f"--- {self.log[-1]}", flush=True)


def python(*arguments):
    return [sys.executable, *arguments]


def pytest(*arguments):
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)




def build(run):
    import torch

    # For this GPU alone: the others' code takes minutes more.
    arch = "{}.{}".format(*torch.cuda.get_device_capability())
    environment = {"USE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch, "MAX_JOBS": str(min(16, os.cpu_count()))}
    return run.do("build", python("setup.py", "-q", "build_ext", "--inplace"), 240, environment)


def tests(run):
    without = "" if importlib.util.find_spec("expecttest") else " and not opcheck"
    if without:
        run.note("opcheck", "left out: there is no expecttest")
    operators = pytest("tests/test_ops.py", "tests/test_wire_ops.py", "-k", f"cuda and not compiles{without}")
    run.do("operators", operators, 120)
    run.do("hooks on Gloo and NCCL", pytest("tests/test_cuda.py"), 150)


def sanitize(run):
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return run.note("compute-sanitizer", "left out: it is not here")
    probe = [tool, "--error-exitcode", "9", *python("-c", "import torch; torch.ones(9, device='cuda').sum().item()")]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        return run.note("compute-sanitizer", "left out: it does not work on this machine")
    # A test of each operator with sizes that several thread blocks share; every example would take an hour.
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *python("benchmarks/operators/every_operator.py")]
        run.do(check, command, 60)


def measure(run, sizes, device, names=None):
    """Every operator at every size; returns figures as pytest-benchmark's record has them."""
    import torch

    from operators import timing

    figures = []
    for megabytes in sizes:
        if reason := timing.why_not(device, megabytes):
            run.note(f"speed at {megabytes} MB", f"left out: {reason}")
            continue
        problem = timing.Problem(megabytes, device)
        for name in names or timing.OPERATORS:
            if run.left() < 10:
                run.note("speed", f"left out from {name} at {megabytes} MB on: no time")
                return figures
            found = timing.measure(name, problem, seconds=0.3)
            print(timing.in_words(found), flush=True)
            size = f"{megabytes}MB" if megabytes < 1000 else f"{megabytes // 1000}GB"
            figures.append({"name": f"test_operator[{name}-{device}-{size}]", "extra_info": {"operator": found}})
        del problem
        if device == "cuda":
            torch.cuda.empty_cache()
    run.note("speed", f"{len(figures)} figures")
    return figures


def step(run, folder):
    """A step of a large model; returns figures as :func:`measure` does."""
    out = folder / "gpu_step.json"
    alone = {"THINWIRE_EXCHANGE_ALONE": "1"}
    if not run.do("step", python("benchmarks/operators/gpu_step.py", "--out", out), 150, alone):
        return []
    figures = []
    for row in json.loads(out.read_text()):
        if "error" in row:
            run.note(f"step of {row['method']}", f"left out: {row['error']}")
            continue
        what = f"a step of {row['parameters'] // 10**6} M parameters on one GPU, {row['method']}"
        one = {"what": what, "ours": row["ours_ms"], "against": "plain DDP", "theirs": row["plain_ms"], "unit": "ms",
               "ratio": row["ours_ms"] / row["plain_ms"], "target": STEP_TARGET}  # fmt: skip
        figures.append({"name": f"gpu_step[{row['method']}]", "extra_info": {"comparisons": [one], "step": row}})
    return figures


def write(figures, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat()
    path.write_text(json.dumps({"datetime": now, "benchmarks": figures}, indent=1) + "\n")


def on_gpu(run, only):
    if "build" in only and not build(run):
        return
    if "tests" in only:
        tests(run)
    if "sanitizer" in only:
        sanitize(run)
    figures = []
    if "step" in only:
        figures += step(run, ROOT / "results")
    if "speed" in only:
        from operators.timing import MEGABYTES

        figures += measure(run, MEGABYTES["cuda"], "cuda")
    if figures:
        write(figures, ROOT / "results/bench_gpu.json")
        table = ROOT / "benchmarks/operators/table.py"
        run.do("figures", python(table, "--add", ROOT / "results/bench_gpu.json"), 60)
        run.do("tables", python(table, "--docs"), 60)


def on_cpu(run, only):
    """The half of it that needs no GPU."""
    if "tests" in only:
        run.do("kernels, emulated", pytest("tests/test_kernels.py"), 1200)
        run.do("kernels, compiled", pytest("tests/test_ops.py", "-k", "compiles"), 1200)
        run.do("every operator", python("benchmarks/operators/every_operator.py"), 300)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        figures = step(run, folder) if "step" in only else []
        figures += measure(run, (1,), "cpu") if "speed" in only else []
        write(figures, folder / "bench_gpu.json")


def main():
    parts = ("build", "tests", "sanitizer", "step", "speed")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "hooks"), str(ROOT / "benchmarks")]
    missing = [name for name in ("torch", "pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"make gpu needs {', '.join(missing)} beside torch: choose another Python with PYTHON=")
    import torch

    run = Run(SECONDS if torch.cuda.is_available() else WITHOUT_GPU)
    if torch.cuda.is_available():
        print(f"--- {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
        on_gpu(run, args.only)
    else:
        print("--- no GPU here (torch.cuda.is_available() is False): what a CPU can do is done", flush=True)
        on_cpu(run, args.only)
    print("\n".join(["", *run.log]))
    if run.failed:
        raise SystemExit(f"failed: {', '.join(run.failed)}")


if __name__ == "__main__":
    main()
