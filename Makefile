# SPDX-License-Identifier: Apache-2.0
# make demo | demo-distributed | test | bench | lint: each makes .venv, builds what it needs and does its job. Quick the second time.
# Must not hold what pip, setup.py or pytest can say in their own files.

PADDLE ?= paddlepaddle==3.3.1
PYTHON ?= python3
VENV   ?= .venv

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
# Paddle 2.6 was built against the NumPy and protobuf of its time, and does not say so.
PINS := $(if $(findstring ==2.,$(PADDLE)),"numpy<2" "protobuf<5")
NATIVE := $(wildcard csrc/*.h csrc/*.cc csrc/*.cu)

.PHONY: help demo demo-distributed test bench lint clean

help:
	@echo "make demo   what the method is for, beside SGD, Momentum and Adam, and where it gains nothing; two pictures"
	@echo "make demo-distributed   two processes come to the numbers of one"
	@echo "make test   the whole test suite"
	@echo "make bench  time a step and an average beside those of Paddle and torch, and whole problems beside scikit-learn's solvers"
	@echo "make lint   ruff and clang-format"
	@echo "make clean  remove $(VENV) and what was built"
	@echo "Some tests:     make test TESTS='tests/test_asgd.py --no-shortcut'"
	@echo "Another Paddle: make test PADDLE=paddlepaddle==3.0.0, or PADDLE=paddlepaddle-gpu==2.6.2"

# Paddle says at every import that there is no ccache.
demo: $(VENV)/built
	PYTHONWARNINGS="ignore:No ccache found" $(PY) examples/converge_exactly.py
	PYTHONWARNINGS="ignore:No ccache found" $(PY) examples/train_digits.py
	@echo
	@echo "Pictures: converge_exactly.png and digits_loss.png. Which batches, which learning rate: docs/choosing-batches.md,"
	@echo "docs/learning-rate.md. The other programs of examples/ run alone, too; README.md says whom the method is for."

demo-distributed: $(VENV)/built
	PYTHONWARNINGS="ignore:No ccache found" $(PY) -m paddle.distributed.launch --nproc_per_node 2 --backend gloo \
	  --log_dir $(VENV)/log examples/distributed_digits.py

# On the CPU, unless the caller names a GPU. A process for each core, each takes whole files: what a file compiles is
# compiled once.
test: $(VENV)/built
	CUDA_VISIBLE_DEVICES="$(CUDA_VISIBLE_DEVICES)" $(PY) -m pytest -q --durations=10 -n auto --dist loadfile $(TESTS)

bench: $(VENV)/built
	$(PY) -m benchmarks
	$(PY) -m benchmarks.averages
	$(PY) -m benchmarks.solvers
	$(PY) -m benchmarks.averaged_sgd

lint: $(VENV)/linters
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE) $(wildcard tests/native/*.h tests/native/*.cc tests/native/*/*.h) \
	  $(wildcard tests/gpu/*.h tests/gpu/*.cu tests/gpu/*/*.h) \
	  $(wildcard benchmarks/*.cc benchmarks/gpu/native/*.h benchmarks/gpu/native/*.cu)

clean:
	rm -rf $(VENV) build dist *.egg-info paddle_asgd/*.so

# ---- The environment: a stamp for each step, made again when what it depends on is newer ------------------------------

$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	touch $@

# Named after the version, so that another PADDLE is installed and built for.
$(VENV)/$(PADDLE): $(VENV)/python
	rm -f $(VENV)/paddlepaddle*
	$(PY) -m pip --quiet uninstall --yes paddlepaddle paddlepaddle-gpu 2>/dev/null
	$(PIP) "$(PADDLE)" $(PINS)
	touch $@

# Editable: changed Python files need no build. The library is younger than this stamp where another environment has
# built it for another Paddle, and then it must be built again.
$(VENV)/built: $(VENV)/$(PADDLE) setup.py pyproject.toml $(NATIVE) paddle_asgd/_C.so
	$(PIP) --group test $(PINS)
	$(PIP) --no-build-isolation --editable .
	touch $@

paddle_asgd/_C.so: ;

$(VENV)/linters: $(VENV)/python pyproject.toml
	$(PIP) --group lint
	touch $@
