# Python 3.11 or newer and make are all that is needed. A few tests need PgBouncer, Chromium, or node and npm, and
# are skipped without.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-httpx2 soak lint format bench

PIP := $(BIN)/pip install --quiet --disable-pip-version-check

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# The program with its dependencies; what the demo and its dashboard need. Modules are compiled when they are used.
$(VENV)/program: pyproject.toml | $(BIN)/pip
	$(PIP) --no-compile --editable ".[web]"
	touch $@

# The program, the test tools and the linters.
$(VENV)/installed: pyproject.toml | $(BIN)/pip
	$(PIP) --editable ".[dev]"
	touch $@ $(VENV)/program

demo: $(VENV)/program
	$(BIN)/audience-sync demo

test: $(VENV)/installed
	$(BIN)/pytest --numprocesses 4 --dist worksteal

test-httpx2: $(VENV)/installed
	$(PIP) httpx2
	TEST_IN_PLACE_OF_HTTPX=httpx2 $(BIN)/pytest --numprocesses 4 --dist worksteal tests/userpilot tests/queue

# About half an hour. Some of it needs Linux, root or strace; tests that lack one of these are skipped with the reason.
soak: $(VENV)/installed
	$(BIN)/pytest soak -rs

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed
	$(BIN)/python benchmarks/sync.py
	$(BIN)/python benchmarks/definitions.py
	$(BIN)/python benchmarks/delivery.py
	$(BIN)/python benchmarks/script.py
	$(BIN)/python benchmarks/intake.py
	$(BIN)/python benchmarks/hot.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/daemon.py
	$(BIN)/python benchmarks/dashboard.py --members 100000 --deliveries 1000000
