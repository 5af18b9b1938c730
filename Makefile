# What people do here. Python 3.11+ and make are all that is needed; one test wants node and npm, and is skipped without.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-httpx2 soak lint format bench

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/audience-sync demo

test: $(VENV)/installed
	$(BIN)/pytest --numprocesses 3 --dist worksteal

test-httpx2: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check httpx2
	TEST_IN_PLACE_OF_HTTPX=httpx2 $(BIN)/pytest --numprocesses 3 --dist worksteal tests/userpilot tests/queue

# Half an hour or so; some of it needs Linux, root or strace, and says so where they are missing.
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
	$(BIN)/python benchmarks/delivery.py
	$(BIN)/python benchmarks/script.py
	$(BIN)/python benchmarks/intake.py
