# `make` alone prints the verbs. Everything is installed into .venv, which `rm -rf .venv` undoes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -c constraints.txt

# two ranks of one core each are faster than one rank of two (profiles/LOG.md); a run resumes with the ranks it had
RANKS ?= 2
LAUNCH := $(BIN)/deepspeed --num_accelerators $(RANKS) --module emf.train
DEMO_TRAIN := $(LAUNCH) digits --out runs/demo --resume
BASE_TRAIN := $(LAUNCH) digits-base --out runs/base --resume

.PHONY: help demo base paper test compat check static bench profile report tune gpu
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed-demo ## train the few-step model from the shipped base and write runs/demo/report.html
	$(DEMO_TRAIN)
	$(BIN)/emf evaluate digits runs/demo
	$(BIN)/emf report runs/demo

base: $(VENV)/installed-demo ## make the shipped base again: flow matching from scratch, at most 90 minutes on 2 cores
	$(BASE_TRAIN)
	$(BIN)/emf evaluate digits runs/base
	$(BIN)/emf report runs/base
	test -e runs/base/digits-base.safetensors || $(BIN)/emf release runs/base --out runs/base/digits-base.safetensors

paper: $(VENV)/installed-demo ## the paper in miniature: runs/paper/report-paper.html in two hours on 2 cores; QUICK=1: minutes
	$(BIN)/emf paper --out runs/paper$(if $(QUICK),-quick --quick)

# these are run once more where sums are rounded in another order: without vector instructions, on two threads
OTHER_ROUNDING := tests/sample tests/evaluate/test_draw.py tests/model/test_model.py tests/model/test_autoencoder.py
test: $(VENV)/installed-test ## run the tests; prints the slowest 15
	env -u TRITON_INTERPRET ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q $(OTHER_ROUNDING)
	env -u TRITON_INTERPRET $(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 0 --durations=15

compat: ## the suite's quick part with the oldest and the newest Python and torch; PAIRS="3.12:2.13.0": with others
	$(PYTHON) -m bench.compat $(PAIRS)

check: $(VENV)/installed-test ## check formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

static: $(VENV)/installed-test ## compile every kernel for six chips and predict its time, without a GPU; CHECK=1: hold the record
	env -u TRITON_INTERPRET $(BIN)/python -m bench.gate $(if $(CHECK),--check)

bench: $(VENV)/installed-test ## what a training step costs by every way to its tangent; BASE=rev: this tree beside a commit
ifdef BASE
	env -u TRITON_INTERPRET $(BIN)/python -m bench.compare $(BASE)
else
	env -u TRITON_INTERPRET $(BIN)/python -m bench.capabilities
	env -u TRITON_INTERPRET $(BIN)/python -m pytest bench -q --benchmark-only --benchmark-columns=median,min,max \
		--benchmark-sort=name --benchmark-storage=file://profiles/benchmarks --benchmark-autosave
	env -u TRITON_INTERPRET $(BIN)/python -m bench.compiled
	$(BIN)/python -m bench.report
endif

profile: $(VENV)/installed-test ## where a step's time goes: runs/profile/breakdown.png and a trace for Perfetto
	env -u TRITON_INTERPRET $(BIN)/python -m bench.profile

report: $(VENV)/installed-test ## profiles/ as one page, profiles/report.html, and the table of docs/benchmarks.md
	$(BIN)/python -m bench.report

tune: $(VENV)/installed-test ## launch configurations, by a GPU's timings or by the compiler's figures
	$(BIN)/python -m bench.tune

# needs torch, triton, numpy and pytest of GPU_PYTHON's own
GPU_PYTHON ?= python3
gpu: ## on a machine with a GPU, without installing: parity, tune, ops, step in 9 minutes; PART=step runs one
	PYTHONPATH=kernels:. $(GPU_PYTHON) -m bench.gpu $(PART)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not Python 3.11 or later; name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-demo: setup.py constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[train,eval]"
	@touch $@

# holds all that the demo needs, so it counts as both
$(VENV)/installed-test: setup.py constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[train,eval,test]"
	@touch $(VENV)/installed-demo $@
