# Commands that do all their own set-up and can be repeated safely:
#   make train    AN-ResNet-50 on the handwritten digits that ship with scikit-learn, on a CPU
#   make test     the whole test suite
#   make quick    the suite without the tests that are marked slow
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test quick clean

train: $(VENV)/.train
	@$(BIN)/python -m anorm build
	$(BIN)/python train.py data=digits norm=an arch=resnet50 hardware=cpu

TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: $(VENV)/.test
	@$(BIN)/python -m anorm build
	$(TESTS)

quick: $(VENV)/.test
	@$(BIN)/python -m anorm build
	$(TESTS) -m "not slow"

# On V100s (compute capability 7.0) the newest torch that runs is 2.14 built for CUDA 12.6: it is installed first, and
# what follows finds it there.
V100 := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -x '7\.0' | head -n 1)
DALI := $(if $(V100),dali-cuda12,dali)
FOR_V100 := 'torch==2.14.*' torchvision --index-url https://download.pytorch.org/whl/cu126

# A stamp is written last: a set-up that was cut off starts again.
$(VENV)/.train: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "anorm needs Python 3.10 or newer: make PYTHON=python3.x"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: apt install python3-venv"; exit 2; }
	@echo "installing into $(VENV) (PyTorch and its libraries: a few minutes, 6 GB)"
ifneq ($(V100),)
	@echo "there are V100s here: PyTorch 2.14 for CUDA 12.6, which wants a driver of the R580 series"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(FOR_V100)
endif
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train]'
	@touch $@

# The tests want every extra too, NVIDIA DALI's CPU pipeline among them.
$(VENV)/.test: $(VENV)/.train
	@echo "installing what the tests want"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,export,det,slurm,$(DALI),test]'
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache
