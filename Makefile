# Commands for contributors. They need .venv: python3 run.py test
.PHONY: check format test full-size docs lock audit

BIN = .venv/bin
AUDIT = build/audit
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.10 $(UPGRADE) \
	--generate-hashes --no-emit-index-url --no-emit-package torch \
	--config-file requirements/uv.toml --constraint requirements/torch.txt \
	--custom-compile-command "make lock" pyproject.toml
UPGRADE = --upgrade
SAME = $(LOCK) --constraint requirements/dev.txt

# Run all checks that a change has to pass.
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

# Build the docs into build/docs. A broken link is an error. Needs no network.
docs:
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env docs build/docs

# Renew the lock files in requirements/. `make lock UPGRADE=` keeps the versions that still fit.
lock:
	$(BIN)/python -m pip install --quiet "uv>=0.9"
	$(LOCK) --extra dev --output-file requirements/dev.txt
	$(SAME) --extra engine --extra mcp --extra planner --output-file requirements/engine.txt
	$(SAME) --extra mcp --extra shared --extra tracing --output-file requirements/service.txt
	$(SAME) --extra serverless --output-file requirements/serverless.txt

# Find insecure code, and known vulnerabilities of the locked packages (needs api.osv.dev).
# The tools have a folder of their own, so that they share no version with the project.
audit: $(AUDIT)/installed
	$(AUDIT)/bin/bandit --quiet --recursive --configfile pyproject.toml src run.py launch.py
	$(AUDIT)/bin/pip-audit --vulnerability-service osv --disable-pip --require-hashes \
		$(foreach name,engine service serverless,--requirement requirements/$(name).txt)
	$(AUDIT)/bin/pip-audit --vulnerability-service osv --disable-pip --no-deps \
		--requirement requirements/torch.txt

$(AUDIT)/installed: Makefile
	python3 -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet "bandit[toml]==1.9.4" "pip-audit==2.10.1"
	touch $@
