# `make check` is what has to pass before a change is handed on. Needs .venv: python3 run.py test
.PHONY: check format test full-size

BIN = .venv/bin

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test:
	$(BIN)/python -m pytest

full-size:
	$(BIN)/python -m pytest -m full_size -s
