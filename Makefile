# make run ARGS="-m ResNet -d CIFAR10" · make test · make test-processors · make test-oldest · make torture · make lint
# make test-cluster (needs root and slurm-wlm) · make test-image (needs root and buildah)
# make bench · make bench-gpu · make clean
# Everything is installed into .venv, with the interpreter PYTHON; into .venv-oldest, for make test-oldest, the lowest
# versions that requirements.txt allows. What needs root is not: where it lacks, that is said and nothing tried.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
ARGS ?=

# What pip does on one core; it fails for files that are meant for other versions of Python, as some packages have.
COMPILE := $(BIN)/python -m compileall -qq -j 0

# One thread: what other threads wait for is noise.
BENCHMARKS := startup training_loop data images nc1 nc1_scaling dib_heads run_with_measures how_far devices clusters \
	quantities

# As which torch can compute here: a processor of any age, one with AVX2, one with AVX-512.
PROCESSORS := default $(shell grep -qs avx2 /proc/cpuinfo && echo avx2) \
	$(shell grep -qs avx512vl /proc/cpuinfo && echo avx512)

.PHONY: run test test-processors test-oldest test-cluster test-image torture lint bench bench-gpu clean

run: $(VENV)/core
	$(BIN)/python main.py $(ARGS)

test: $(VENV)/test
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-processors: $(VENV)/test
	set -e; for processor in $(PROCESSORS); do for threads in 1 2; do \
		export ATEN_CPU_CAPABILITY=$$processor OMP_NUM_THREADS=$$threads; \
		echo "as on a processor with: $$processor, threads: $$threads"; $(BIN)/python -m pytest -n 2 $(ARGS); \
	done; done

test-oldest: $(OLDEST)/test
	$(OLDEST)/bin/python -m pytest -n 2 $(ARGS)

test-cluster: $(VENV)/test
	$(BIN)/python -m pytest -rs tests/cluster.py $(ARGS) || [ $$? = 5 ]

test-image: $(VENV)/test
	$(BIN)/python -m pytest -rs tests/image.py $(ARGS) || [ $$? = 5 ]

torture: test-processors
	$(BIN)/python -m pytest -s tests/torture.py $(ARGS)
	FUZZ=3000 $(BIN)/python -m pytest --timeout 1800 tests/test_robustness.py -k any $(ARGS)

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/test
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
	$(BIN)/python -m pip install --quiet --no-compile -r requirements-test.txt
	$(COMPILE) $(VENV)/lib || true
	touch $@ $(VENV)/core

$(OLDEST)/test: requirements-test.txt requirements.txt
	$(PYTHON) -m venv $(OLDEST)
	sed 's/>=/==/' requirements.txt > $(OLDEST)/lowest.txt
	$(OLDEST)/bin/python -m pip install --quiet -r requirements-test.txt -c $(OLDEST)/lowest.txt
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .ruff_cache .hypothesis
