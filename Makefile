# Weir: `make run` serves with nothing to set up, `make test` installs what the tests need and passes them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEV := $(VENV)/.dev-installed
RUN := $(VENV)/.run-installed

# What the tests of chart and deploy run: helm 3, helm 4, linters, compose, built by Go; and checkov.
TOOLS := $(VENV)/tools
HELM := v3.22.0
HELM4 := v4.3.1
KUBE_SCORE := v1.20.0
HELM_DOCS := v1.14.2
COMPOSE := v5.6.0
CHECKOV := $(VENV)/checkov/.installed

# Tests wait much: for a drain, a failover, a scrape.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(4, 1 + (os.cpu_count() or 1)))")

.PHONY: help run dev-cluster test tools check format bench e2e bump image lock docs dashboards-preview clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

run: $(RUN) ## serve on 127.0.0.1:8000 with the simulator; the environment reaches it
	@exec $(BIN)/python -m service serve --welcome

test: $(DEV) tools ## everything that needs no cluster
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)
	@$(BIN)/coverage combine -q
	$(BIN)/coverage report

tools: $(TOOLS)/.helm-$(HELM) $(TOOLS)/.helm4-$(HELM4) $(TOOLS)/.kube-score-$(KUBE_SCORE) $(TOOLS)/.helm-docs-$(HELM_DOCS) $(TOOLS)/.docker-compose-$(COMPOSE) $(CHECKOV) ## what the tests of the chart run; where Go is missing, those on PATH are taken
	@missing=; for name in helm helm4 kube-score helm-docs docker-compose; do \
		test -x $(TOOLS)/$$name || command -v $$name >/dev/null || missing="$$missing $$name"; done; \
	test -z "$$missing" || echo "weir: not here, and not built for want of Go:$$missing. Tests that run them are skipped."

check: $(DEV) ## format, lint, types, the arrows of the design
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: $(DEV) ## let ruff mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV) ## Weir beside a bare proxy, in one run; an answer from the cache; callers who leave
	$(BIN)/python -m tests.performance $(ARGS)
	$(BIN)/python -m tests.performance.cached
	$(BIN)/python -m tests.performance.leaving

# Any command with the same words (`image TAG CONTEXT ARG...`, `env`) does; for other clusters see docs/development.md.
CLUSTER ?= ../shared/cluster/cluster

dev-cluster: ## the developer's round on a cluster: build, install, sync, forward, logs
	@eval "$$($(CLUSTER) env)" && exec $(PYTHON) -m deploy.dev.round --image localhost/weir:dev \
		--build "$(CLUSTER) image localhost/weir:dev . --target dev" --values deploy/dev/cluster.yaml

e2e: $(DEV) tools ## the chart on a cluster: KUBECONFIG's, else the one that CLUSTER starts; ARGS="--rollouts 10" for long
	@rm -f build/e2e-report.md
	@if [ -z "$$KUBECONFIG" ]; then \
		$(CLUSTER) up && $(CLUSTER) image localhost/weir:e2e . && eval "$$($(CLUSTER) env)" || exit 1; fi; \
	PATH="$(abspath $(TOOLS)):$$PATH" $(BIN)/python -m pytest tests/e2e $(ARGS); code=$$?; \
	test ! -f build/e2e-report.md || cat build/e2e-report.md; exit $$code

bump: ## set the version everywhere: make bump VERSION=X.Y.Z
	@$(PYTHON) -m deploy.release $(VERSION)

image: ## the container image, by whatever builder is there
	$(if $(shell command -v docker),docker,buildah) build -t weir:dev .

LOCK := $(BIN)/uv pip compile -q --universal --generate-hashes --no-emit-index-url --custom-compile-command "make lock"

lock: $(DEV) ## pin all dependencies with their hashes
	$(LOCK) --python-version 3.11 -o requirements/runtime.txt pyproject.toml
	$(LOCK) --python-version 3.11 -c requirements/runtime.txt --group dev -o requirements/dev.txt pyproject.toml
	$(LOCK) --python-version 3.11 --group reload -o requirements/reload.txt
	$(LOCK) --python-version 3.11 --group checkov -o requirements/checkov.txt

docs: $(DEV) $(TOOLS)/.helm-docs-$(HELM_DOCS) ## write what the code says: the docs' tables, the chart's schema and README, the dashboards
	$(BIN)/python -m docs.generate
	$(BIN)/python -m dashboards

dashboards-preview: $(DEV) ## draw the dashboards from a run of traffic: about four minutes; ARGS=--again from the last one
	$(BIN)/python -m dashboards.preview $(ARGS)

clean: ## the environment and what tests leave behind
	rm -rf $(VENV) build .coverage* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "weir: $(PYTHON) is older than 3.11; set PYTHON=/path/to/a/newer/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN): requirements/runtime.txt | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements/runtime.txt
	@touch $@

$(DEV): requirements/dev.txt | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements/dev.txt
	@touch $@ $(RUN)

# A helm that is built this way takes its own library's Kubernetes for the cluster's; helm 3 has to be told which.
HELM3_FLAGS := -X helm.sh/helm/v3/internal/version.version=$(HELM) \
	$(foreach package,lint/rules chartutil,-X helm.sh/helm/v3/pkg/$(package).k8sVersionMajor=1 \
	-X helm.sh/helm/v3/pkg/$(package).k8sVersionMinor=34)

# $(call tool,NAME,PACKAGE,VERSION,LINKER FLAGS): the program NAME, built when its version is not there yet.
define tool
$(TOOLS)/.$(1)-$(3): | $(BIN)/python
	@mkdir -p $(TOOLS)
	@! command -v go >/dev/null || { echo "weir: building $(1) $(3), once"; \
		CGO_ENABLED=0 GOBIN=$(abspath $(TOOLS))/new nice go install -p 2 -trimpath -ldflags '-s -w $(4)' $(2)@$(3) && \
		mv $(TOOLS)/new/$(notdir $(2)) $(TOOLS)/$(1) && rm -f $(TOOLS)/.$(1)-v* && touch $$@; } || test -z "$$$$CI"
endef
$(eval $(call tool,helm,helm.sh/helm/v3/cmd/helm,$(HELM),$(HELM3_FLAGS)))
$(eval $(call tool,helm4,helm.sh/helm/v4/cmd/helm,$(HELM4),-X helm.sh/helm/v4/internal/version.version=$(HELM4)))
$(eval $(call tool,kube-score,github.com/zegl/kube-score/cmd/kube-score,$(KUBE_SCORE)))
$(eval $(call tool,helm-docs,github.com/norwoodj/helm-docs/cmd/helm-docs,$(HELM_DOCS)))

# Its module excludes versions of others, so Go builds it within the module alone.
$(TOOLS)/.docker-compose-$(COMPOSE): | $(BIN)/python
	@mkdir -p $(TOOLS)
	@! command -v go >/dev/null || { echo "weir: building docker-compose $(COMPOSE), once"; \
		cd "$$(go mod download -json github.com/docker/compose/v5@$(COMPOSE) | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')" && \
		CGO_ENABLED=0 nice go build -p 2 -buildvcs=false -trimpath -ldflags '-s -w' -o $(abspath $(TOOLS))/docker-compose ./cmd && \
		touch $(abspath $@); } || test -z "$$CI"

$(CHECKOV): requirements/checkov.txt | $(BIN)/python
	$(PYTHON) -m venv $(VENV)/checkov
	$(VENV)/checkov/bin/pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements/checkov.txt
	@touch $@
