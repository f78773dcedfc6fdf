# make setup | course | test | check | lab | chat | bench | gpu-check | outputs | measurements | clean; each but clean prepares .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

# Threads that wait sleep soon, also in a notebook that loads torch before anything else (qwen_mini/course/environment.py).
export GOMP_SPINCOUNT ?= 1000
export KMP_BLOCKTIME ?= 1

.PHONY: setup course test check lab chat bench gpu-check outputs measurements clean

setup: $(READY)

# torch first: the rest is then resolved around the version that is already there
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: name one, as in make setup PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $(READY)

course: $(READY)
	$(BIN)/qwen-mini run --scale $(or $(SCALE),quick)

# the course at quick, which fills the cores itself; then what fits beside each other, a worker for each core
test: $(READY)
	failed=0; $(BIN)/python -m pytest -m notebooks || failed=1; \
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal -m 'not notebooks and not render' || failed=1; \
	exit $$failed

check: $(READY)
	$(BIN)/python -m authoring.checks

lab: $(READY)
	$(BIN)/jupyter lab notebooks

chat: $(READY)
	$(BIN)/qwen-mini chat --scale $(or $(SCALE),laptop)

bench: $(READY)
	$(BIN)/python benchmarks/run.py

# eight minutes at most, on one GPU
gpu-check: $(READY)
	$(BIN)/python benchmarks/gpu_check.py

outputs: $(READY)
	$(BIN)/qwen-mini outputs

measurements: $(READY)
	$(BIN)/python -m authoring.measurements

# what is quick to make again; the results of the larger scales stay
clean:
	rm -rf runs/quick build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find qwen_mini tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
