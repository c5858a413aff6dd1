# `make train` and `make test` are all there is to do on a fresh machine with make and python3
# (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train words lab report figure test test-2.11 check clean

# RLPR as published, as near as flags come (README, "Methods are flags").
RLPR := --aggregator arithmetic_mean --clip-null --null frozen --answer-weight none --filter-std 0.5

# The embedded task, three times: NRT discovers how to think, RLPR unlearns it, plain SFT never
# starts. Two to three minutes on 2 CPU cores.
train: .venv/ready
	$(BIN)/python train.py --out runs/hops --overwrite
	$(BIN)/python train.py --out runs/hops-rlpr --overwrite $(RLPR)
	$(BIN)/python train.py --out runs/hops-sft --overwrite --traces 0
	$(BIN)/python examples/hops/compare.py runs/hops runs/hops-rlpr runs/hops-sft

# With and without an easy part of the answer: where arithmetic_mean stops thinking. Under ten minutes.
lab: .venv/ready
	$(BIN)/python examples/lab.py --quick

# A model that nobody made for the task: a short run of SmolLM2-135M on word problems.
words: .venv/ready
	$(BIN)/python examples/words/make.py
	$(BIN)/python examples/words/model.py
	$(BIN)/python train.py --model runs/words-task/base --data runs/words-task/train.jsonl \
	  --eval-data runs/words-task/test.jsonl --eval-questions 50 --eval-every 6 --max-trace 32 \
	  --temperature 0.7 --lr 1e-5 --questions 4 --traces 8 --steps 12 --out runs/words --overwrite

# The runs of `make train` as one HTML page: curves, traces, token by token.
report: .venv/ready
	$(BIN)/python examples/report.py runs/hops runs/hops-rlpr runs/hops-sft \
	  -o examples/hops/report.html

test: .venv/ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The same on torch 2.11.0 for CUDA 13.0, whose Triton is 3.6.0: the oldest versions supported, and
# those of a GPU image. They install without a GPU: 4.7 GB.
test-2.11: .torch-2.11/ready
	PYTHONPATH=$(CURDIR)/.torch-2.11 $(BIN)/python -m pytest

# Kills at every write, ranks, long runs, `make train` beside README, a dry run of bench/gpu.py.
check: .venv/ready-to-test
	$(BIN)/python -m pytest -m slow

# The README's figure: five methods as published, five seeds, 25 minutes. All that needs matplotlib
# here.
figure: .venv/ready
	$(BIN)/pip install --quiet matplotlib==3.11.0
	for method in "NRT" "RLPR $(RLPR)" "SFT --traces 0" "LaTRO --aggregator log_prob --scale none" \
	    "VeriFree --aggregator prob --scale none --answer-weight exact"; do \
	  set -- $$method; name=$$1; shift; \
	  for seed in 0 1 2 3 4; do \
	    $(BIN)/python train.py --out runs/figure/$$name-$$seed --overwrite --seed $$seed $$@ || exit 1; \
	  done; \
	done
	$(BIN)/python examples/plot.py runs/figure examples/hops/figure.svg

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

# Triton: a CUDA build of torch brings its own; elsewhere the tests run the kernels in its interpreter
# and compile them. Triton 3.6.0 beside it is the version of torch 2.11: they are compiled on both.
.venv/ready-to-test: .venv/ready requirements-test.txt
	$(BIN)/pip install --quiet -r requirements-test.txt
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet triton==3.9.0
	rm -rf .triton-3.6.0
	$(BIN)/pip install --quiet --no-deps --target .triton-3.6.0 triton==3.6.0
	touch $@

# numpy: the interpreter of Triton 3.6.0 needs one below 2.4.
.torch-2.11/ready: .venv/ready-to-test
	rm -rf .torch-2.11
	$(BIN)/pip install --quiet --target .torch-2.11 torch==2.11.0 numpy==2.3.5
	touch $@

clean:
	rm -rf .venv .triton-3.6.0 .torch-2.11 runs
