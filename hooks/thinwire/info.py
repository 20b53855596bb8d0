"""``python -m thinwire info``: which parts are live here, and why the others are not."""

import importlib.util
import json
import platform
from pathlib import Path

import torch

import thinwire
from thinwire import ops


def collect() -> list[tuple[str, str]]:
    """Part and what there is to say of it, in the order in which they are printed."""
    built = _built()
    rows = [
        ("thinwire", thinwire.__version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} found" + (f", {built['torch']} built against" if built else "")),
        ("C++ operators", _operators("cpu")),
        ("CUDA operators", _operators("cuda")),
        ("Horovod", _horovod()),
        ("torch.distributed", _backends()),
    ]
    if built:
        rows.insert(3, ("built with", ", ".join(f"{key} {value}" for key, value in built.items() if key != "torch")))
    return rows


def _built():
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else None


def _operators(device):
    if ops.native(device):
        if device == "cuda" and not torch.cuda.is_available():
            return "built, but there is no GPU"
        return "live"
    reason = ops.why_not_native()
    if reason is None:
        cuda = torch.version.cuda
        reason = "not built: this torch has no CUDA" if cuda is None else "not built: no nvcc when thinwire was built"
    return f"not live ({reason}); plain PyTorch runs instead, and is slower"


def _horovod():
    if importlib.util.find_spec("horovod") is None:
        return (
            "not installed, and thinwire.horovod needs it; 0.28.1 builds against today's torch with C++17 for C++14 in "
            "its two CMakeLists.txt, which 'make horovod' in thinwire's repository does"
        )
    try:
        import horovod
        import horovod.torch  # noqa: F401
    except Exception as error:
        return f"installed, but horovod.torch does not import: {error}"
    return f"live, {horovod.__version__}"


def _backends():
    import torch.distributed as dist

    if not dist.is_available():
        return "not in this torch"
    return ", ".join(name for name in ("gloo", "nccl", "mpi") if getattr(dist, f"is_{name}_available")())


def main() -> None:
    """Print it."""
    rows = collect()
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")

