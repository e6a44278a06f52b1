# make demo    set up, then run the main job on real images
# make fast    at every save: ruff, and the quick tests
# make test    set up, then run the whole test suite
# make test-transformers VERSION=5.17.0
#              the adapters' tests on another transformers (by default the newest)
# make test-oldest
#              the core's tests on the oldest versions that the metadata allows (torch's is the newest)
# make test-sanitized
#              the kernels' tests under sanitizers, where the compiler has them
# make test-wheel
#              a wheel with the CPU kernels in it, into dist/, and the demo with what it brings
# make lint    ruff (format, rules) and mypy
# make format  let ruff mend what it can
# make hooks   run ruff and mypy before each commit from now on
# make docs    build the documentation strictly, into site/
# make bench   time a small fixed workload, and add its figures to docs/bench.json
# make clean   remove what the others made, virtual environment included
#
# VENV=DIR puts the virtual environment elsewhere, PYTHON=... picks the interpreter for it.

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$p"; break; }; done)
# Arguments for `kvpolicy demo` and for pytest, e.g. make test ARGS="-m 'not slow'".
ARGS ?=

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo fast test test-transformers test-oldest test-sanitized test-wheel lint format hooks docs bench clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.ready-demo
	$(BIN)/kvpolicy demo $(ARGS)

fast: $(VENV)/.ready-dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/python -m pytest --quick -q -n auto --dist worksteal $(ARGS)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# A virtual environment whose packages lie above those of $(VENV), which they would only repeat.
define above
	@rm -rf $(1)
	@$(BIN)/python -m venv $(1)
	@$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' \
		% sysconfig.get_path('purelib'))" > "$$(echo $(1)/lib/python*/site-packages)/base.pth"
endef

# pip is given no constraints here: what this transformers wants beside it is what is tried.
VERSION ?=
OTHER = $(VENV)-transformers$(VERSION:%=-%)
test-transformers: $(VENV)/.ready-dev
	$(call above,$(OTHER))
	@$(OTHER)/bin/python -m pip install -qq --disable-pip-version-check --upgrade \
		"transformers$(VERSION:%===%)"
	@version() { "$$1/bin/python" -c "import importlib.metadata as m; print(m.version('transformers'))"; }; \
	echo "transformers $$(version $(OTHER)), beside $$(version $(VENV)) in $(VENV)"; \
	if [ "$$(version $(OTHER))" = "$$(version $(VENV))" ]; then \
		echo "the same version: make test runs these tests"; \
	else $(OTHER)/bin/python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS) tests/adapters; fi

test-oldest: $(VENV)/.ready-dev
	$(call above,$(VENV)-oldest)
	@$(VENV)-oldest/bin/python -m pip install -qq --disable-pip-version-check --upgrade \
		$$($(BIN)/python .ci/oldest.py testing)
	$(VENV)-oldest/bin/python -m pytest -q -n auto --dist worksteal --quick $(ARGS) \
		tests/core tests/policies tests/ops tests/cache/test_copies.py tests/cache/test_memory.py \
		tests/cache/test_linear_reference.py tests/testing/test_invariants.py

test-sanitized: $(VENV)/.ready-dev
	.ci/sanitized $(BIN)/python -n auto --dist worksteal $(ARGS)

# What an installation brings is enough: no kernel of this user's, and a folder that is not this one.
test-wheel: $(VENV)/.ready-dev
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation
	test -f dist/*-py3-none-linux_x86_64.whl
	$(call above,$(VENV)-wheel)
	@$(VENV)-wheel/bin/python -m pip install -qq --disable-pip-version-check --no-deps --force-reinstall dist/*.whl
	cd $(VENV)-wheel && export KVPOLICY_KERNELS=none && bin/python -P -c "\
	from kvpolicy.ops.cpu import native; print(native.in_use()); assert native.in_use()" && \
	bin/kvpolicy demo --images 10 --scored 2 --policies linear --out demo

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

hooks: $(VENV)/.ready-dev
	$(BIN)/pre-commit install

docs: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.ready-dev
	$(BIN)/python .ci/bench.py $(ARGS)

# Installations, that of the build backend included, take the pinned versions and no others.
$(VENV)/.ready-%: export PIP_CONSTRAINT = constraints.txt
$(VENV)/.ready-%: export PIP_BUILD_CONSTRAINT = constraints.txt
$(VENV)/.ready-%: export PIP_DISABLE_PIP_VERSION_CHECK = 1

# The demo needs less than the tests do, so that a newcomer waits less. A stamp is older than the
# files that say what is to be installed as soon as one of them changes.
$(VENV)/.ready-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing kvpolicy and what the demo needs into $(VENV) (a minute or more) ..."
	@$(BIN)/python -m pip install -qq --editable ".[lab]"
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing kvpolicy and everything for development into $(VENV) (a minute or more) ..."
	@$(BIN)/python -m pip install -qq --editable ".[all,ray,dev,docs,lm-eval]"
	@touch $@ $(VENV)/.ready-demo

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "kvpolicy needs Python 3.11 or newer, and found neither python3.11 nor such a" \
			"python3; install one, or name yours: make PYTHON=/path/to/python" >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "kvpolicy needs Python 3.11 or newer; PYTHON=$(PYTHON) is not" >&2; exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; \
		echo "$(PYTHON) can't make a virtual environment; on Debian or Ubuntu," \
			"install the package python3-venv" >&2; exit 1; }

clean:
	rm -rf "$(VENV)" "$(VENV)"-* build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find adapters examples kvpolicy tests -name __pycache__ -type d -prune -exec rm -rf {} +
