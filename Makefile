# `make check` is what has to pass before a change is handed on. Needs .venv: python3 run.py test
.PHONY: check format test full-size

BIN = .venv/bin

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	python3 run.py test

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test:
	python3 run.py test

full-size:
	$(BIN)/python -m pytest -m full_size -s
