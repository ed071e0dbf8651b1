# make run ARGS="-m ResNet -d CIFAR10" · make test · make lint · make clean
# Everything is installed into .venv, with the interpreter PYTHON.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run test lint clean

run: $(VENV)/core
	$(BIN)/python main.py $(ARGS)

test: $(VENV)/test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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
