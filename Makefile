# `make demo` and `make test` do all the set-up themselves; nothing but Python 3.11 and make needed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo-$(shell date +%Y-%m-%d_%H%M%S)

.PHONY: demo bench test lint types docs clean

# The environment is brought up to date when what it is made from changes.
$(VENV)/demo: EXTRAS := train,study
$(VENV)/test: EXTRAS := train,study,eval,theory,gpu,test,dev,docs
$(VENV)/demo $(VENV)/test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: $(VENV)/demo
	$(BIN)/paceline compare --minutes 3.25 --out $(DEMO)

bench: $(VENV)/demo
	$(BIN)/paceline bench

test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder  # of one thread each

lint: $(VENV)/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/test
	$(BIN)/mypy

# The site, in build/site: its pages are the repository's own files, each at its own place.
PAGES := README.md CONTRIBUTING.md LICENSE docs results benchmarks examples
docs: $(VENV)/test
	mkdir -p build/pages
	ln -sfn $(addprefix ../../,$(PAGES)) build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) build .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
