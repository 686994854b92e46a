# `make demo` and `make test` do all the set-up themselves; nothing but Python 3.11 and make needed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo-$(shell date +%Y-%m-%d_%H%M%S)

.PHONY: demo bench test lint types clean

# Rebuilt when what it is made from changes.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,study,eval,theory,gpu,test,dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/paceline compare --minutes 3.25 --out $(DEMO)

bench: $(VENV)/installed
	$(BIN)/paceline bench

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile  # two processes of one thread each

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
