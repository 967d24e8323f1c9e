# make demo: install, then the main job from pictures to a picture. make test: install, then all checks.
# make test-portable: the tests that compare bits, with the kernels of other processors and with two threads.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
PYTEST := $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
LINT := $(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy
CAPS := \
	"OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2" \
	"OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2" \
	"OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive"

.PHONY: demo test test-portable lint clean

demo: $(STAMP)
	$(VENV)/bin/python tools/demo.py

test: $(STAMP)  # mypy works on one core: the tests begin beside it
	@($(LINT)) & lint=$$!; \
	$(PYTEST) --durations=10; tests=$$?; \
	wait $$lint || { echo "Lint failed, see above, or run make lint."; exit 1; }; \
	exit $$tests

test-portable: $(STAMP)
	@failed=; for cap in $(CAPS); do \
		echo "$$cap"; env $$cap $(PYTEST) -m bits || failed="$$failed\n  $$cap"; \
	done; \
	test -z "$$failed" || { printf "Failed with:$$failed\n"; exit 1; }

lint: $(STAMP)
	$(LINT)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 13) else "Python 3.10 to 3.13 is needed, this is " + sys.version.split()[0] + ". Name another with make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info
