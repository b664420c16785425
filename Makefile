# Everything runs from a virtual environment of its own, .venv. Only Python >= 3.11 and make have to be there.
PYTHON ?= python3
ARGS ?=
# A release of vLLM for `make test-vllm`, in place of the pinned one; each has an environment of its own.
VLLM ?=
VLLM_ENV := .venv-vllm$(VLLM:%=-%)
# The matrices of the sample and of the tests are small: on them, threads wait for each other more than they work.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-vllm lint types clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: .venv/run  ## Compress, verify and export 16 small adapters that are included
	@.venv/bin/python -m lorazip_cli demo --force -o build/demo

test: .venv/dev  ## Run the quick tests (ARGS="-k verify" for some of them)
	.venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

test-all: .venv/dev  ## Run all tests
	.venv/bin/python -m pytest -n 2 --dist worksteal -m "not acceptance and not network" $(ARGS)

test-vllm: $(VLLM_ENV)/run  ## Run the tests in vLLM and of kernels, in an environment of 3.2 GB (VLLM=0.30.0 for another release)
	HF_HUB_OFFLINE=1 $(VLLM_ENV)/bin/python -m pytest -n 2 --dist loadfile -m "not acceptance and not network" tests/vllm tests/serving/test_kernels.py $(ARGS)

lint: .venv/dev  ## Check style and formatting
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

types: .venv/dev  ## Check the types
	.venv/bin/python -m mypy

clean:  ## Remove the virtual environment and all that was built or cached
	rm -rf .venv .venv-vllm* build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The markers are younger than what they were made from, so that a second call installs nothing.
.venv/run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "lorazip needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
		"Name another one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VLLM_ENV)/run: pyproject.toml constraints-vllm.txt .ci/vllm-env
	PYTHON=$(PYTHON) .ci/vllm-env $(VLLM_ENV) $(VLLM)
	@touch $@

.venv/dev: .venv/run
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[test,lint]'
	@touch $@
