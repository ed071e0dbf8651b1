# make run ARGS="-m ResNet -d CIFAR10" · make test · make torture · make lint · make bench · make bench-gpu · make clean
# Everything is installed into .venv, with the interpreter PYTHON.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# One thread: what other threads wait for is noise.
BENCHMARKS := startup training_loop data nc1 nc1_scaling dib_heads run_with_measures how_far devices

.PHONY: run test torture lint bench bench-gpu clean

run: $(VENV)/core
	$(BIN)/python main.py $(ARGS)

test: $(VENV)/test
	$(BIN)/python -m pytest -n 2 $(ARGS)

torture: $(VENV)/test
	$(BIN)/python -m pytest -s tests/torture.py $(ARGS)
	FUZZ=3000 $(BIN)/python -m pytest --timeout 1800 tests/test_robustness.py -k any $(ARGS)

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/core
	set -e; for name in $(BENCHMARKS); do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py $(ARGS); done
	$(BIN)/python benchmarks/refresh_readme.py

bench-gpu: $(VENV)/core
	$(BIN)/python benchmarks/gpu.py $(ARGS)
	cat benchmarks/results/gpu.json
	$(BIN)/python benchmarks/refresh_readme.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/core: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/test: requirements-test.txt requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	touch $@ $(VENV)/core

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
