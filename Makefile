# `make train` and `make test` are all there is to do on a fresh machine with python3 (3.11 or newer) and make.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train sft figure test lint clean

# The embedded task: a 0.8M-parameter Llama discovers how to think (about a minute on 2 CPU cores), then plain SFT for comparison.
train: .venv/ready
	$(BIN)/python train.py --out runs/hops --overwrite
	$(BIN)/python train.py --out runs/hops-sft --overwrite --traces 0

test: .venv/ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# The README's figure, from the two runs of `make train`. The only thing here that needs matplotlib.
figure: .venv/ready
	$(BIN)/pip install --quiet matplotlib==3.11.0
	$(BIN)/python examples/hops/plot.py runs/hops runs/hops-sft examples/hops/figure.svg

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

# Triton: a CUDA build of torch has brought its own; elsewhere the tests run the kernels through its interpreter and compiler.
# Triton 3.6.0 beside it: the kernels are compiled on the version that ships with torch 2.11, too.
.venv/ready-to-test: .venv/ready requirements-test.txt
	$(BIN)/pip install --quiet -r requirements-test.txt
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet triton==3.9.0
	rm -rf .triton-3.6.0
	$(BIN)/pip install --quiet --no-deps --target .triton-3.6.0 triton==3.6.0
	touch $@

clean:
	rm -rf .venv .triton-3.6.0 runs
