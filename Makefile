.DEFAULT_GOAL := help
.PHONY: help setup demo demo-transformers test scored serving beside-alone beside-captures beside-unit alone captures \
	lint types unit integration bench docs clean

PYTHON ?= python3
BIN := .venv/bin
# Integration tests that share no server with others.
ALONE := tests/integration/generate \
	$(patsubst %,tests/integration/test_%.py,transformers_activation packaging demo vllm_offline vllm_model \
	vllm_encoder)
# Verdicts on runs whose truth is known: that holds where nothing else wants the engine's cores.
SCORED := tests/integration/test_scenario_harness.py
# Those that mostly wait: for agents, and for nsys.
CAPTURES := $(patsubst %,tests/integration/test_%.py,agent captures capture_deaths capture_hangs capture_nodes \
	nsys_range run_nsys operator_verbs)

# Benchmarks, without those that need a GPU where there is none, or nsys, and what runs a list of them.
ON_GPU := $(addprefix benchmarks/,accuracy.py counter_gaps.py cupti_growth.py event_cost.py gpu_scenarios.py \
	torch_after_windows.py traffic_ncu.py window_cost.py windows_endurance.py)
BY_NSYS := benchmarks/nsys_memory.py
BENCHMARKS = $(filter-out benchmarks/beside.py $(if $(wildcard /dev/nvidiactl),,$(ON_GPU)) $(if $(shell command -v nsys),,$(BY_NSYS)),\
	$(wildcard benchmarks/*.py))

help: ## List these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
		awk -F '\t' '{ printf "  make %-18s %s\n", $$1, $$2 }'

setup: ## Make .venv with llmprobe, its tools and vLLM (the CPU build where there is no GPU)
	@$(PYTHON) scripts/setup.py

demo: setup ## Serve a tiny model with vLLM, drive it, and watch it being measured
	@$(BIN)/llmprobe demo

demo-transformers: setup ## The same for a Hugging Face program that calls generate
	@$(BIN)/llmprobe demo --transformers

test: ## Everything CI checks: set-up, lint, types, unit and integration tests
	@$(PYTHON) scripts/setup.py --prometheus --nsys
	@$(MAKE) --no-print-directory scored; scored=$$?; \
		$(MAKE) --no-print-directory -k -j4 serving beside-alone beside-captures beside-unit && exit $$scored

scored:
	@$(BIN)/pytest $(SCORED) --durations=3

# Four parts for two cores: the first two take longest, the third mostly waits.
serving:
	@$(BIN)/pytest tests/integration tests/gpu --durations=15 $(patsubst %,--ignore=%,$(SCORED) $(ALONE) $(CAPTURES))

# What these say waits until they have ended.
beside-alone: PARTS := alone
beside-captures: PARTS := captures
beside-unit: PARTS := lint types unit
beside-alone beside-captures beside-unit:
	@log=$$(mktemp); $(MAKE) --no-print-directory -k $(PARTS) >$$log 2>&1; status=$$?; \
		echo; cat $$log; rm -f $$log; exit $$status

alone:
	@$(BIN)/pytest $(ALONE) --durations=15

captures:
	@$(BIN)/pytest $(CAPTURES) --durations=15

lint: ## ruff: rules and format
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: ## mypy, strict
	@$(BIN)/mypy

unit: ## The quick tests alone
	@$(BIN)/pytest tests/unit

integration: ## The tests that start real engines, and those that need a GPU
	@$(BIN)/pytest tests/integration tests/gpu --durations=15

bench: ## What llmprobe costs and how true its figures are: the tables in docs/
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: ## Print docs/metrics.md anew from the catalogue
	@$(BIN)/python -m llmprobe.export.document > docs/metrics.md.new && mv docs/metrics.md.new docs/metrics.md

clean: ## Remove .venv and what builds and tests leave
	rm -rf .venv .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
