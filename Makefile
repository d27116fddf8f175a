# Shortcuts; every command also stands in README.md. `make` alone lists them.
PYTHON ?= python
.DEFAULT_GOAL := help
.PHONY: help install test test-slow test-slurm lint format types run smoke paper wheels slurm-check ci clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## install in place with everything for development, and the commit hooks
	$(PYTHON) -m pip install -e ".[dev]"
	pre-commit install

test: ## run the tests (no GPU, no Slurm, nothing slow)
	$(PYTHON) -m pytest -n 2 --dist worksteal

test-slow: ## run the tests that take minutes
	$(PYTHON) -m pytest -m slow

test-slurm: ## sweeps on a real Slurm on loopback (root; tests/slurm/cluster.sh install)
	$(PYTHON) -m pytest -m slurm tests/slurm

lint: ## what CI checks: style, format, types
	ruff check .
	ruff format --check .
	mypy src

format: ## fix style and format
	ruff check --fix .
	ruff format .

run: ## the main job
	$(PYTHON) src/run.py

smoke: ## everything once, as small as it goes
	$(PYTHON) src/run.py experiment=smoke

# What the paper's numbers are made of: make paper RUNS='[multirun/2026-11-24/10-00-00-000000]'
RUNS ?= [paper/data/*.json]
paper: ## paper/build/main.pdf from RUNS (Debian: latexmk texlive-latex-recommended texlive-fonts-recommended)
	$(PYTHON) src/run.py task=report report=paper report.runs='$(RUNS)'
	cd paper && latexmk -pdf -interaction=batchmode -halt-on-error -silent -outdir=build main.tex >/dev/null || { cat build/main.log >&2; exit 1; }
	$(PYTHON) paper/check_log.py paper/build/main.log

wheels: ## everything a cluster without internet needs, in wheels/ (on Linux, with the cluster's Python: PYTHON=python3.10)
	$(PYTHON) -m pip wheel --quiet --wheel-dir wheels -c constraints/athena.txt .

slurm-check: ## on a cluster's login node, before the first sweep: make slurm-check ARGS="model=llama31_8b"
	$(PYTHON) src/run.py task=slurm_check hydra/launcher=athena $(ARGS)

ci: ## what CI runs, from a fresh environment
	.ci/run

clean: ## remove caches; results in outputs/ and multirun/ stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist paper/build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
