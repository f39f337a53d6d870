# make search   the demo search          make check   lint, types, tests
# make test     the tests                make install the environment alone
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: search test check lint install
search: install
	$(BIN)/python cli.py search

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

# A stamp newer than what it was made from: a second call installs nothing.
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cli,report,test]'
	touch $@
