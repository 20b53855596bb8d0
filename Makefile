# make demo | test | test-full | lint | docs | bench | bench-full | horovod | gpu   each sets up what it needs in .venv
# make test-torch TORCH=2.6.0      the core tests on another torch, in an environment of its own
PYTHON  ?= python3
VENV    := .venv
PY      := $(VENV)/bin/python
PIP     := $(PY) -m pip --disable-pip-version-check -q
HOROVOD := 0.28.1
TORCH   ?= 2.6.0

.PHONY: demo test test-full test-torch lint docs bench gpu bench-full horovod clean
.DELETE_ON_ERROR:

demo: $(VENV)/.thinwire $(VENV)/.iproute2
	$(PY) benchmarks/demo/run.py

# Two workers, because some tests wait for processes and others compute; a file's tests stay with one worker.
test: lint $(VENV)/.horovod $(VENV)/.iproute2
	$(PY) -m pytest tests -n 2 --dist loadfile -m "not full"

test-full: lint $(VENV)/.horovod $(VENV)/.iproute2
	$(PY) -m pytest tests -n 2 --dist loadfile

# That setup.py's range is true. torch and what it pins itself come as it wants them, all else as in constraints.txt.
# Where the index has no CPU build of that torch, this brings CUDA's libraries, some gigabytes.
test-torch: TORCH_VENV := .venv-torch-$(TORCH)
test-torch:
	test -x $(TORCH_VENV)/bin/python || $(PYTHON) -m venv $(TORCH_VENV)
	grep -v -E '^(torch|sympy|triton|cuda-|nvidia-)' constraints.txt > $(TORCH_VENV)/constraints.txt
	$(TORCH_VENV)/bin/python -m pip --disable-pip-version-check -q install -c $(TORCH_VENV)/constraints.txt \
	    "setuptools<81" wheel ninja torch==$(TORCH) numpy scipy pytest pytest-timeout pytest-xdist \
	    hypothesis expecttest
	rm -rf $(TORCH_VENV)/source && mkdir $(TORCH_VENV)/source
	cp -r setup.py pyproject.toml MANIFEST.in csrc hooks $(TORCH_VENV)/source
	rm -rf $(TORCH_VENV)/source/hooks/thinwire/*.so $(TORCH_VENV)/source/hooks/thinwire/_build.json
	USE_CPP=1 USE_CUDA=0 $(TORCH_VENV)/bin/python -m pip --disable-pip-version-check -q install \
	    --no-build-isolation --no-deps --force-reinstall $(TORCH_VENV)/source
	$(TORCH_VENV)/bin/thinwire info
	$(TORCH_VENV)/bin/python -m pytest tests/test_ops.py tests/test_wire_ops.py tests/test_ddp.py tests/test_memory.py \
	    tests/test_methods.py tests/test_handle.py -n 2 --dist loadfile -m "not full"

bench: $(VENV)/.thinwire $(VENV)/.iproute2
	mkdir -p results
	$(PY) -m pytest benchmarks/operators --benchmark-only --benchmark-json results/bench_raw.json
	$(PY) benchmarks/operators/table.py results/bench_raw.json
	$(PY) benchmarks/suite/steps.py --quick --out results
	$(PY) benchmarks/suite/train.py --quick --out results

# On a machine with a GPU and nvcc, whose Python (PYTHON=) has a torch with CUDA, pytest and hypothesis: builds, tests
# and measures, in under nine minutes, and writes the figures into the docs. Without a GPU: what a CPU can do of it.
# Where PYTHON has no torch, .venv is made and has it.
.SECONDEXPANSION:
gpu: HAS_TORCH = $(shell $(PYTHON) -c "import torch, pytest, hypothesis" 2>/dev/null && echo yes)
gpu: $$(if $$(HAS_TORCH),,$(VENV)/.thinwire)
	$(if $(HAS_TORCH),$(PYTHON),$(PY)) benchmarks/operators/gpu.py

# Says how long it will take, which is some days, and goes on where it was interrupted. The steps come first: they
# want a machine with nothing else to do.
bench-full: $(VENV)/.thinwire $(VENV)/.iproute2
	$(PY) benchmarks/suite/steps.py --out results
	$(PY) benchmarks/suite/train.py --out results
	$(PY) benchmarks/suite/report.py --out results --draw

horovod: $(VENV)/.horovod

lint: $(VENV)/.thinwire
	$(PY) -m ruff check .
	$(VENV)/bin/lint-imports --no-logo
	$(PY) -m mypy hooks/thinwire

docs: $(VENV)/.thinwire
	$(PY) -m sphinx -W --keep-going -q docs build/docs
	@echo "docs: build/docs/index.html"

clean:
	rm -rf $(VENV) .venv-torch-* build hooks/thinwire/*.so hooks/*.egg-info

$(VENV)/.deps: constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt "setuptools<81" wheel packaging ninja
	$(PIP) install -c constraints.txt torch numpy pytest pytest-benchmark pytest-timeout \
	    pytest-xdist hypothesis expecttest rich matplotlib scikit-learn transformers \
	    ruff mypy import-linter coverage sphinx furo myst-parser sybil
	touch $@

# --no-build-isolation: an isolated build would download torch a second time.
$(VENV)/.thinwire: $(VENV)/.deps setup.py $(shell find csrc -type f)
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

# Horovod's last release asks for C++14 and today's torch headers need C++17; that line of its two
# CMakeLists.txt is all that is changed, so what gets tested is stock Horovod. The wheel is kept.
$(VENV)/.horovod: $(VENV)/.deps
	$(PIP) install -c constraints.txt cmake pybind11 cloudpickle psutil pyyaml
	mkdir -p $(VENV)/horovod
	set -e; if ! ls $(VENV)/horovod/*.whl >/dev/null 2>&1; then \
	    $(PIP) download --no-deps --no-binary :all: --no-build-isolation -d $(VENV)/horovod horovod==$(HOROVOD); \
	    tar -xzf $(VENV)/horovod/horovod-$(HOROVOD).tar.gz -C $(VENV)/horovod; \
	    sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 17/' \
	        $(VENV)/horovod/horovod-$(HOROVOD)/CMakeLists.txt \
	        $(VENV)/horovod/horovod-$(HOROVOD)/horovod/torch/CMakeLists.txt; \
	    echo "building Horovod $(HOROVOD): a few minutes, once"; \
	    PATH="$(abspath $(VENV))/bin:$$PATH" \
	    HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
	    HOROVOD_WITHOUT_MPI=1 HOROVOD_WITH_GLOO=1 \
	    $(PIP) wheel --no-deps --no-build-isolation -w $(VENV)/horovod $(VENV)/horovod/horovod-$(HOROVOD) \
	        > $(VENV)/horovod/build.log 2>&1 || { tail -n 40 $(VENV)/horovod/build.log; exit 1; }; \
	fi
	$(PIP) install --no-deps $(VENV)/horovod/horovod-$(HOROVOD)-*.whl
	touch $@

# The thin network needs ip and tc. Without them, or the right to install them, it says so and runs unshaped.
$(VENV)/.iproute2: $(VENV)/.deps
	@command -v ip >/dev/null 2>&1 && command -v tc >/dev/null 2>&1 || { \
	    [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 \
	    && apt-get -qq update && apt-get -qq install -y iproute2 >/dev/null; } \
	    || echo "iproute2 is missing and could not be installed: the network will not be shaped" >&2
	@touch $@
