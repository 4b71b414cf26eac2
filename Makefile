# Each target makes its own virtual environment in .venv (or .venv-test), once.
PYTHON ?= python3

.PHONY: demo test lint bench fuzz mutants clean

demo: .venv/done            ## train the small model that comes with minilora
	.venv/bin/python scripts/train.py

test: .venv-test/done       ## the whole suite
	.venv-test/bin/pytest

lint: .venv-test/done       ## ruff: rules and format
	.venv-test/bin/ruff check . && .venv-test/bin/ruff format --check .

bench: .venv-test/done      ## a training step beside transformers + PEFT
	.venv-test/bin/python scripts/dev/bench.py --peer

fuzz: .venv-test/done       ## bad inputs over every script, and ten minutes of random changes of good ones
	PYTHONPATH=.:tests:scripts:scripts/dev OMP_NUM_THREADS=1 .venv-test/bin/python -m fuzz --seconds 600

mutants: .venv-test/done    ## would the tests notice? faults put in by hand, one at a time
	.venv-test/bin/python tests/fuzz/mutants.py

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e .
	touch $@

.venv-test/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install -q -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv .venv-test
