# `make demo` and `make test` do all the set-up themselves; nothing but Python >= 3.11 and make needed.
# The newest that starts; a name that only says so does not count.
PYTHON ?= $(or $(shell for name in python3.13 python3.12 python3.11 python3; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; \
	done),$(error no Python >= 3.11 found: name one by make PYTHON=...))
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo-$(shell date +%Y-%m-%d_%H%M%S)

.PHONY: demo bench test lint types docs release-notes clean

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
	! grep -rE '<(script|link)[^>]+"(https?:)?//[^"]+\.(js|css)|unpkg' build/site --include='*.html'

release-notes:  # of CHANGELOG.md; fails where VERSION has none, or is not the package's, or has no date
	@$(PYTHON) -c 'import re, sys, tomllib; text = open("CHANGELOG.md").read(); \
	own = tomllib.load(open("pyproject.toml", "rb"))["project"]["version"]; \
	found = re.search(r"(?ms)^## $(VERSION) \(\d{4}-\d\d-\d\d\)\n(.*?)(?=^## |\Z)", text); \
	sys.exit("CHANGELOG.md has no dated $(VERSION), or pyproject.toml has another version") \
	if own != "$(VERSION)" or not found else print(found[1].strip())'

clean:
	rm -rf $(VENV) build .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
