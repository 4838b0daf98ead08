# Each target works from nothing on a machine with Python 3.11 or newer and a network.
#   make docs     write the documentation as a site to site
#   make demo     read a picture with a model cut in two              make check    format, lint, types
#   make chat     two processes answer a question, and the answer goes on when one of them is killed
#   make test     the tests, about 20 minutes on two cores            make bench    list the benchmarks; BENCH=FOLDER/FILE runs one
#   make test-all      also the slow tests, all frameworks, and the soak (5 GB to install, 36 GB of disk)
#   make test-export   the exporters' tests with all frameworks (5 GB to install; about two minutes to run)
#   make test-lowest   the quick tests with the lowest allowed version of every dependency
#   make test-newest   the quick tests with the newest version of every dependency
# PYTHON is the interpreter, VENV the folder of the environment, and WORKERS the number of processes that run the tests.
# EXTRAS are the extras that make test installs; without transformers, PyTorch and the exporters' tests are skipped.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 3
EXTRAS ?= cpu,demo,deploy,docs,lightgbm,otel,ray,serve,simplify,sklearn,test,transformers
ALL_FRAMEWORKS := cpu,catboost,jax,lightgbm,simplify,sklearn,tensorflow,test,transformers,xgboost
BIN := $(VENV)/bin
LOWEST_PYTHON ?= python3.11
# The tests of a file run in one process, and conftest.py puts the slowest files first.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt

.PHONY: demo chat docs test test-all test-export test-lowest test-newest check bench soak clean
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

chat: $(VENV)/demo.stamp
	$(BIN)/python models/chat.py

docs: | $(BIN)/python
	$(PIP) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

test: $(VENV)/test.stamp
	$(PYTEST)

# An empty -m also selects the tests that are marked as exhaustive.
test-all: $(VENV)/test.stamp
	$(PIP) --editable '.[$(EXTRAS),$(ALL_FRAMEWORKS)]'
	$(PYTEST) -m ""
	$(BIN)/python benchmarks export/exporters
	$(MAKE) soak

test-export: | $(BIN)/python
	$(PIP) --editable '.[$(ALL_FRAMEWORKS)]'
	$(PYTEST) -m "" tests/onnxsplit/test_export.py tests/onnxsplit/test_export_inputs.py \
		tests/integration/test_export_docs.py
	$(BIN)/python benchmarks export/exporters

# The quick tests: the unit tests of both packages, a pipeline of real processes, and the gateway over HTTP and gRPC.
# Together they use every dependency of the extras below. The exporters are left out: their frameworks take gigabytes,
# and the oldest versions of these need an older NumPy than the rest.
QUICK_EXTRAS := cpu,deploy,otel,serve,test
QUICK_TESTS := tests/onnxsplit tests/runtime tests/integration/test_pipeline.py tests/integration/test_gateway.py \
	--ignore-glob 'tests/onnxsplit/test_export*.py'

# uv can resolve to the lowest versions; pip cannot. Only direct dependencies are set to their lowest version. The
# newest versions are installed without tests/constraints.txt. Each environment is created from scratch.
test-lowest: RESOLUTION := lowest-direct
test-lowest: RESOLVER_PYTHON = $(LOWEST_PYTHON)
test-newest: RESOLUTION := highest
test-newest: RESOLVER_PYTHON = $(PYTHON)
test-lowest test-newest: test-%:
	$(RESOLVER_PYTHON) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)-$*/bin/uv pip install --quiet --python $(VENV)-$*/bin/python --resolution $(RESOLUTION) --compile-bytecode \
		--editable '.[$(QUICK_EXTRAS)]'
	$(VENV)-$*/bin/uv pip list --python $(VENV)-$*/bin/python
	$(VENV)-$*/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(QUICK_TESTS)

check: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Without BENCH it lists the benchmarks and about how long each takes. ARGS are options of the benchmark.
bench: $(VENV)/test.stamp
	$(BIN)/python benchmarks $(BENCH) $(ARGS)

SOAK := faults/soak faults/recovery faults/chaos gateway/hostile faults/garbage data_path/many_requests \
	faults/endings faults/mutated_files cutting/large_models hosts/larger_model hosts/links

soak: $(VENV)/test.stamp
	set -e; for name in $(SOAK); do $(BIN)/python benchmarks $$name; done

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest build site *.egg-info
