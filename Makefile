# Every target works on a fresh machine with python3.11+, make and a C compiler: each creates what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := protos/penstock/kv/v1/kv.proto protos/penstock/worker/v1/worker.proto \
	protos/penstock/telemetry/v1/telemetry.proto protos/penstock/batch/v1/batch.proto

.PHONY: setup demo serve test chaos check bench bench-gpu eval proto helm docs clean

setup: $(STAMP)

# torch first and exact: a range would take the newest CUDA build, several GB, before the constraints could speak.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,parity,dev,otel,docs,plot]"
	touch $@

demo: setup
	$(BIN)/penstock demo

serve: setup
	$(BIN)/penstock serve ledger

test: setup
	$(BIN)/python -m pytest

# The store's crash matrix, longer than in `make test`: so many schedules for each machine that draws them.
SCHEDULES ?= 5000
chaos: setup
	$(BIN)/python -m pytest -q -s tests/chaos --chaos-schedules $(SCHEDULES)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/buf lint
	$(BIN)/python -m tests.security.audit

bench: setup
	mkdir -p results
	$(BIN)/penstock bench serve --json results/bench-serve.json
	$(BIN)/penstock bench front --json results/bench-front.json
	$(BIN)/penstock bench store --json results/bench-store.json
	$(BIN)/penstock bench engine --json results/bench-engine.json

# Needs a CUDA device; on a CPU: `python -m bench.kernels --tiny --backend reference --parts stack`.
bench-gpu: setup
	mkdir -p results
	$(BIN)/python -m bench.kernels --json results/bench-kernels.json

# Answers about long documents by the shipped model through HTTP; docs/evaluation.md has the figures of a longer run.
LENGTHS ?= 1k,8k,32k
QUESTIONS ?= 110
eval: setup
	mkdir -p results
	$(BIN)/penstock eval all ledger --lengths $(LENGTHS) --questions $(QUESTIONS) --launcher local \
		--json results/eval.json --plot results/eval.png

proto: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. \
		--mypy_out=. --mypy_grpc_out=. $(PROTOS)

# Schema and README from the product's configuration, then lint, render and validate.
helm: setup
	$(BIN)/python -m cluster.chart helm/penstock
	$(BIN)/python -m pytest -q tests/helm

# Into build/site; offline: pages of the reference are made from the code, nothing is loaded from elsewhere.
docs: setup
	$(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV) results build dist *.egg-info
