# Each target works from nothing on a machine with Python 3.11 or newer and a network.
#   make demo     read a picture with a network cut in two            make check    format, lint, types
#   make test     the tests, about six minutes on two cores           make bench    the benchmarks
#   make test-all      the tests that take long too, with all frameworks, and the soak (5 GB to install, 36 GB of disk)
#   make test-export   the exporters' tests with all frameworks (5 GB to install; about two minutes to run)
# PYTHON chooses the interpreter; VENV the folder of the environment; EXTRAS what make test installs (leave out
# transformers to skip the exporter's tests and PyTorch's download); WORKERS how many processes run the tests.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 3
EXTRAS ?= cpu,demo,deploy,lightgbm,otel,ray,serve,simplify,sklearn,test,transformers
ALL_FRAMEWORKS := cpu,catboost,jax,lightgbm,simplify,sklearn,tensorflow,test,transformers,xgboost
BIN := $(VENV)/bin
# Each file's tests run in one process, and conftest.py has the longest files first.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt

.PHONY: demo test test-all test-export check bench soak clean
.DELETE_ON_ERROR:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(f"onnxsplit needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml tests/constraints.txt | $(BIN)/python
	$(PIP) --editable '.[cpu,demo]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml tests/constraints.txt | $(BIN)/python
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/python models/demo.py

test: $(VENV)/test.stamp
	$(PYTEST)

# An empty -m takes the tests that are marked as exhaustive too.
test-all: $(VENV)/test.stamp
	$(PIP) --editable '.[$(EXTRAS),$(ALL_FRAMEWORKS)]'
	$(PYTEST) -m ""
	$(BIN)/python benchmarks/export/run.py
	$(MAKE) soak

test-export: | $(BIN)/python
	$(PIP) --editable '.[$(ALL_FRAMEWORKS)]'
	$(PYTEST) -m "" tests/onnxsplit/test_export.py tests/integration/test_export_docs.py
	$(BIN)/python benchmarks/export/run.py

check: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/test.stamp
	$(BIN)/python benchmarks/throughput/run.py
	$(BIN)/python benchmarks/hop/run.py
	$(BIN)/python benchmarks/scaling/run.py
	$(BIN)/python benchmarks/memory/run.py
	$(BIN)/python benchmarks/spread/run.py
	$(BIN)/python benchmarks/generality/run.py
	$(BIN)/python benchmarks/halves/run.py
	$(BIN)/python benchmarks/backend/run.py
	$(BIN)/python benchmarks/balance/run.py
	$(BIN)/python benchmarks/keys/run.py
	$(BIN)/python benchmarks/promise/run.py
	$(BIN)/python benchmarks/gateway/run.py
	$(BIN)/python benchmarks/ray/run.py
	$(BIN)/python benchmarks/simulation/run.py
	$(BIN)/python benchmarks/export/run.py

soak: $(VENV)/test.stamp
	$(BIN)/python benchmarks/soak/run.py
	$(BIN)/python benchmarks/faults/run.py
	$(BIN)/python benchmarks/chaos/run.py
	$(BIN)/python benchmarks/hostile/run.py
	$(BIN)/python benchmarks/wire/run.py
	$(BIN)/python benchmarks/requests/run.py
	$(BIN)/python benchmarks/ends/run.py
	$(BIN)/python benchmarks/fuzz/run.py
	$(BIN)/python benchmarks/large/run.py
	$(BIN)/python benchmarks/larger/run.py
	$(BIN)/python benchmarks/hosts/run.py

clean:
	rm -rf $(VENV) build *.egg-info
