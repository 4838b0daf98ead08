# Each target works from nothing on a machine with Python 3.11 or newer and a network.
#   make demo     read a picture with a network cut in two            make check    format, lint, types
#   make test     the tests, about six minutes on two cores           make bench    list the benchmarks; BENCH=FOLDER/FILE runs one
#   make test-all      the tests that take long too, with all frameworks, and the soak (5 GB to install, 36 GB of disk)
#   make test-export   the exporters' tests with all frameworks (5 GB to install; about two minutes to run)
#   make test-lowest   the quick tests with the lowest allowed version of every dependency
#   make test-newest   the quick tests with the newest version of every dependency
# PYTHON chooses the interpreter; VENV the folder of the environment; EXTRAS what make test installs (leave out
# transformers to skip the exporter's tests and PyTorch's download); WORKERS how many processes run the tests.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 3
EXTRAS ?= cpu,demo,deploy,lightgbm,otel,ray,serve,simplify,sklearn,test,transformers
ALL_FRAMEWORKS := cpu,catboost,jax,lightgbm,simplify,sklearn,tensorflow,test,transformers,xgboost
BIN := $(VENV)/bin
LOWEST_PYTHON ?= python3.11
# Each file's tests run in one process, and conftest.py has the longest files first.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt

.PHONY: demo test test-all test-export test-lowest test-newest check bench soak clean
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
	$(BIN)/python benchmarks export/exporters
	$(MAKE) soak

test-export: | $(BIN)/python
	$(PIP) --editable '.[$(ALL_FRAMEWORKS)]'
	$(PYTEST) -m "" tests/onnxsplit/test_export.py tests/onnxsplit/test_export_inputs.py \
		tests/integration/test_export_docs.py
	$(BIN)/python benchmarks export/exporters

# The quick tests: those of the offline half and of the runtime, then a pipeline of real processes and the gateway over
# HTTP and gRPC. Between them they call every dependency of the extras below. The exporters stay out: their frameworks
# are gigabytes, and their oldest versions need older Pythons' NumPy than the rest.
QUICK_EXTRAS := cpu,deploy,otel,serve,test
QUICK_TESTS := tests/onnxsplit tests/runtime tests/integration/test_pipeline.py tests/integration/test_gateway.py \
	--ignore-glob 'tests/onnxsplit/test_export*.py'

# uv resolves to the lowest versions, which pip cannot. Only direct dependencies are held low: theirs are not ours.
# The newest ones are taken without tests/constraints.txt. Each environment is made anew, since versions are its point.
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

# Without BENCH it lists the benchmarks, and about how long each takes; ARGS are the options of the one that is run.
bench: $(VENV)/test.stamp
	$(BIN)/python benchmarks $(BENCH) $(ARGS)

SOAK := faults/soak faults/recovery faults/chaos gateway/hostile faults/garbage data_path/many_requests \
	faults/endings faults/mutated_files cutting/large_models hosts/larger_model hosts/links

soak: $(VENV)/test.stamp
	set -e; for name in $(SOAK); do $(BIN)/python benchmarks $$name; done

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest build *.egg-info
