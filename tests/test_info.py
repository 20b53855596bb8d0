import subprocess
import sys

import torch
from thinwire import info, ops


def test_info_says_what_is_live_and_what_it_was_built_with():
    command = [sys.executable, "-m", "thinwire", "info"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for part in ("thinwire", "torch", "C++ operators", "CUDA operators", "Horovod", "gloo"):
        assert part in printed
    assert torch.__version__ in printed


def test_info_gives_the_reason_for_what_is_not_live():
    rows = dict(info.collect())
    for device, part in (("cpu", "C++ operators"), ("cuda", "CUDA operators")):
        live = ops.native(device) and (device == "cpu" or torch.cuda.is_available())
        assert (rows[part] == "live") == live
        assert live or "(" in rows[part] or "no GPU" in rows[part]
