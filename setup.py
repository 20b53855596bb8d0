"""Builds thinwire, and thinwire._C where it can.

USE_CPP        the compiled operators: by default built, and left out with one line where that fails
 |- 0          none; the package runs on plain PyTorch
 `- 1          insist: an error where they do not build
USE_CUDA       CUDA operators: by default where torch has CUDA and nvcc is found
 |- 0          CPU operators only
 `- 1          insist: an error if torch has no CUDA or nvcc is missing
TORCH_CUDA_ARCH_LIST, MAX_JOBS      as for every PyTorch extension

Build with --no-build-isolation: the operators fit the torch that they were built for, which must be the one you use.
"""

import json
import os
import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

CPP = os.environ.get("USE_CPP", "")
CUDA = os.environ.get("USE_CUDA", "")
# One binary for every Python from 3.10 on; free-threaded builds have no limited API.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")


def without_operators(reason):
    if CPP == "1" or CUDA == "1":
        raise SystemExit(f"thinwire: the compiled operators are not built: {reason}")
    print(f"thinwire: installing without compiled operators: {reason}", file=sys.stderr)
    return {}


def operators():
    """setup()'s arguments for thinwire._C, or none."""
    if CPP == "0":
        return {}
    if os.name != "posix":
        return without_operators("no one has compiled them with anything but GCC and Clang")
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        return without_operators(f"torch cannot be imported ({error}); is this an isolated build?")

    # Not torch.cuda.is_available(): machines that build often have no GPU.
    with_cuda = CUDA != "0" and torch.version.cuda is not None and CUDA_HOME is not None
    if CUDA == "1" and not with_cuda:
        raise SystemExit(f"thinwire: USE_CUDA=1, but torch.version.cuda is {torch.version.cuda} and "
                         f"CUDA_HOME is {CUDA_HOME}")  # fmt: skip

    class BuildOperators(BuildExtension):
        def run(self):
            self.force = True  # what was built before may be of another torch
            try:
                super().run()
            except (Exception, SystemExit) as error:
                without_operators(str(error).strip().splitlines()[0] if str(error) else type(error).__name__)
                self.extensions = self.distribution.ext_modules = []
                return
            about = {
                "torch": torch.__version__,
                "cuda": torch.version.cuda if with_cuda else None,
                "compiler": compiler_version(),
            }
            built = Path(self.get_ext_fullpath("thinwire._C"))
            built.with_name("_build.json").write_text(json.dumps(about, indent=1) + "\n")

    # -ffp-contract=off and -fmad=false: a fused multiply-add would round once where the reference rounds twice.
    flags = ["-O3", "-ffp-contract=off"]
    if sys.platform == "linux":
        flags += ["-fopenmp", "-fvisibility=hidden"]
    sources = ["csrc/bindings.cpp", *files("csrc/cpu", "*.cpp")]
    if with_cuda:
        sources += [*files("csrc/cuda", "*.cpp"), *files("csrc/cuda", "*.cu")]
    extension = (CUDAExtension if with_cuda else CppExtension)(
        "thinwire._C",
        sources,
        extra_compile_args={
            "cxx": flags,
            "nvcc": ["-O3", "-fmad=false"],
        },
        extra_link_args=["-fopenmp"] if sys.platform == "linux" else [],
        py_limited_api=LIMITED,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildOperators},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
    }


def files(folder, pattern):
    return sorted(str(path) for path in Path(folder).glob(pattern))


def compiler_version():
    import subprocess

    try:
        command = [os.environ.get("CXX", "c++"), "--version"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return platform.python_compiler()


setup(
    name="thinwire",
    version="0.1.0",
    description="Data-parallel PyTorch training on slow networks",
    package_dir={"": "hooks"},
    packages=find_packages("hooks"),
    package_data={"thinwire": ["_build.json", "py.typed"]},
    entry_points={"console_scripts": ["thinwire = thinwire.__main__:main"]},
    license="Apache-2.0",
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "numpy"],
    extras_require={
        "test": ["pytest", "pytest-timeout", "hypothesis", "expecttest", "scikit-learn", "rich", "matplotlib"],
        "bench": ["pytest", "pytest-benchmark", "rich", "matplotlib", "scikit-learn", "transformers"],
    },
    **operators(),
)
