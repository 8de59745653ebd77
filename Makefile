# Everything runs in .venv, made from constraints.txt. `make demo` is the place to start.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where `make real-models` puts the checkpoints, outside the repository.
REAL_MODELS ?= ../real-models
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-all test-distributed lint bench real-models gpu-kit clean

$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/dev: $(VENV)/base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,deepspeed,eval,gguf,kernels,quantization]'
	touch $@

demo: $(VENV)/base  ## distil a language model on real text, in minutes
	$(BIN)/hf-distill run recipes/quickstart.yaml

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## the everyday tier, 10 to 25 minutes on 2 cores
	$(PYTEST) -m "not slow"

test-all: lint  ## the full grids, at most an hour
	$(PYTEST)

test-distributed: lint  ## every engine on two processes
	$(PYTEST) -m distributed

$(VENV)/bench: $(VENV)/base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

bench: $(VENV)/bench  ## speed and memory beside other libraries, over an hour alone
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/head.py --temperature 2
	$(BIN)/python benchmarks/step.py --dtype float32,bfloat16

$(VENV)/gguf: $(VENV)/base
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf]'
	touch $@

real-models: $(VENV)/gguf  ## two real checkpoints (176 MB), for recipes/smollm2.yaml and benchmarks/pruning.py
	$(BIN)/python benchmarks/real_models.py $(REAL_MODELS)

gpu-kit: $(VENV)/dev  ## wheels for a GPU machine without a network, see docs/performance.md
	$(BIN)/python benchmarks/gpu_kit.py

clean:
	rm -rf $(VENV) runs .gpu-kit
