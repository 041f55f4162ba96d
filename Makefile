# `make demo` and `make test` do everything on a fresh Linux machine with Python 3.11 to 3.13.

VENV := .venv
STAMP := $(VENV)/.installed
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# The first Python that fits; choose another with `make setup PYTHON=/path/to/python3.12`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(IN_RANGE)' 2>/dev/null && echo $$p && break; done)

.PHONY: setup demo test lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@python='$(PYTHON)'; test -n "$$python" && "$$python" -c '$(IN_RANGE)' 2>/dev/null || \
		{ echo "found no Python 3.11 to 3.13 ($${python:-$$(python3 --version 2>&1)}):" \
		"install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 2; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make a virtual environment: install its venv package" \
		"(on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	@test -x $(VENV)/bin/pip || '$(PYTHON)' -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -e '.[dp,report,medical,onnx,ray,share,tracking,dev]' -c constraints.txt
	@touch $@

demo: setup
	$(VENV)/bin/medistill demo

# One thread per worker: small networks gain nothing from more.
test: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
