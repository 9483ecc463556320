# Two commands that do all their own set-up and can be repeated safely:
#   make train    AN-ResNet-50 on the handwritten digits that ship with scikit-learn, on a CPU
#   make test     the whole test suite
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup train test lint clean

setup: $(VENV)/.ready

# The stamp is written last: a set-up that was cut off starts again.
$(VENV)/.ready: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "anorm needs Python 3.10 or newer; set PYTHON=python3.x"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: apt install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,export,slurm,test]'
	@touch $@

# The C++ kernels are compiled once for the torch that is installed; without a compiler the plain path is used.
.PHONY: kernels
kernels: setup
	@$(BIN)/python -m anorm build

train: kernels
	$(BIN)/python train.py data=digits norm=an arch=resnet50 hardware=cpu

test: kernels
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) runs .pytest_cache
