# Weir: `make run` serves with nothing to set up, `make test` installs what the tests need and passes them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEV := $(VENV)/.dev-installed
RUN := $(VENV)/.run-installed

.PHONY: help run test check format bench image lock docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

run: $(RUN) ## serve on 127.0.0.1:8000 with the simulator; the environment reaches it
	@exec $(BIN)/python -m service serve --welcome

test: $(DEV) ## everything that needs no cluster
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(ARGS)
	@$(BIN)/coverage combine -q
	$(BIN)/coverage report

check: $(DEV) ## format, lint, types, the arrows of the design
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: $(DEV) ## let ruff mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV) ## Weir beside a bare proxy, in one run
	$(BIN)/python -m tests.performance $(ARGS)
	@$(BIN)/python -m tests.performance.leaving >/dev/null

image: ## the container image, by whatever builder is there
	$(if $(shell command -v docker),docker,buildah) build -t weir:dev .

lock: $(DEV) ## pin all dependencies with their hashes
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" -o requirements/runtime.txt pyproject.toml
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" -c requirements/runtime.txt --group dev \
		-o requirements/dev.txt pyproject.toml

docs: $(DEV) ## write the tables of the docs from the code
	$(BIN)/python -m docs.generate

clean: ## the environment and what tests leave behind
	rm -rf $(VENV) .coverage* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "weir: $(PYTHON) is older than 3.11; set PYTHON=/path/to/a/newer/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN): requirements/runtime.txt | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/runtime.txt
	@touch $@

$(DEV): requirements/dev.txt | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@touch $@ $(RUN)
