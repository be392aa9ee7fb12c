# make demo   set everything up and run the main job
# make test   set everything up and run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

OTHER := $(VENV)-torch-$(TORCH)
# Triton 3.6, which comes with it, needs an older NumPy for its interpreter.
NEEDED_BY_2.11.0 := 'numpy<2.4'

.PHONY: help setup demo test check test-slow test-real test-runtimes test-servers test-torch gpu bench docs lint clean

help:  ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## Build .venv with the versions that were tested

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "onelora-compile needs Python 3.11 or newer with venv; $(PYTHON) is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt setuptools wheel
	@echo "installing PyTorch and the other dependencies, a few minutes the first time"
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $(READY)

demo: $(READY)  ## Adapt a pretrained sentence encoder to three tasks, compare, swap, export (3 minutes)
	$(BIN)/onelora demo

test: $(READY)  ## Run the tests
	$(BIN)/pytest -n auto --maxprocesses 4

# One file of each room, none of which compiles much.
QUICK := $(addprefix tests/,test_rooms.py test_ops.py test_eager.py test_targets.py test_merge.py test_fingerprint.py \
  passes/test_identity.py exporters/test_check_onnx.py exporters/test_manifest.py)

check: lint  ## Before a commit: style, types and the quickest tests, about a minute
	$(BIN)/pytest -q -n auto --maxprocesses 4 $(QUICK)

test-slow: $(READY)  ## Run the long tail of the tests
	$(BIN)/pytest -n auto --maxprocesses 4 -m slow

# Of most packages only the data is read, and the others need nothing for what is tested.
test-real: $(READY)  ## Install published files, Polygraphy and tritonclient, and run the tests that take them
	$(BIN)/pip install --disable-pip-version-check -q --no-deps -r tests/real_packages.txt
	$(BIN)/pytest -m real

# An environment of its own: what ExecuTorch needs is much, and nothing else here needs it.
RUNTIMES := $(VENV)-runtimes

$(RUNTIMES)/.ready: pyproject.toml constraints.txt tests/runtime_packages.txt tests/runtime_packages_alone.txt
	$(PYTHON) -m venv $(RUNTIMES)
	$(RUNTIMES)/bin/pip install --disable-pip-version-check -q -c constraints.txt setuptools wheel
	$(RUNTIMES)/bin/pip install --disable-pip-version-check -q -c constraints.txt --no-build-isolation -e '.[dev]' \
	  -r tests/runtime_packages.txt
	$(RUNTIMES)/bin/pip install --disable-pip-version-check -q --no-deps -r tests/runtime_packages_alone.txt
	touch $@

test-runtimes: $(RUNTIMES)/.ready  ## Install ExecuTorch, OpenVINO, NNCF, onnxruntime-genai, modelopt, and run the tests that use them
	$(RUNTIMES)/bin/pytest -n auto --maxprocesses 4 -m runtimes

# vLLM pins its own PyTorch and transformers, so no constraints here; its torchvision is for CUDA and does not load.
# SGLang's code that reads adapters runs with vLLM's packages; its torchvision is kept from vLLM in a folder.
# The source of llama-cpp-python holds the converter that the tests compare with.
SERVERS := $(VENV)-servers
LLAMA_CPP := llama-cpp-python==0.3.36

$(SERVERS)/.ready: pyproject.toml tests/server_packages.txt tests/sglang_packages.txt
	$(PYTHON) -m venv $(SERVERS)
	$(SERVERS)/bin/pip install --disable-pip-version-check -q 'setuptools>=77' wheel -r tests/server_packages.txt
	$(SERVERS)/bin/pip uninstall --disable-pip-version-check -q -y torchvision torchaudio torchcodec
	$(SERVERS)/bin/pip install --disable-pip-version-check -q --no-build-isolation -e .
	rm -rf $(SERVERS)/sglang
	$(SERVERS)/bin/pip install --disable-pip-version-check -q --no-deps --target $(SERVERS)/sglang -r tests/sglang_packages.txt
	$(SERVERS)/bin/pip download --disable-pip-version-check -q --no-deps --no-binary :all: -d $(SERVERS)/source $(LLAMA_CPP)
	tar -xzf $(SERVERS)/source/*.tar.gz -C $(SERVERS)/source --strip-components 1
	rm -rf $(SERVERS)/llama.cpp && mv $(SERVERS)/source/vendor/llama.cpp $(SERVERS)/llama.cpp
	@echo "building llama.cpp, ten minutes or more"
	$(SERVERS)/bin/pip install --disable-pip-version-check -q $(LLAMA_CPP)
	touch $@

test-servers: $(SERVERS)/.ready  ## Install vLLM and SGLang, build llama.cpp and run the tests that serve adapters with them
	$(SERVERS)/bin/pytest -m servers tests/test_llama_cpp.py tests/test_sglang.py tests/test_vllm.py

# What depends on PyTorch's version goes with it; the rest is as tested.
$(OTHER)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OTHER)
	grep -vE '^(torch|triton|setuptools|sympy$(if $(NEEDED_BY_$(TORCH)),|numpy))==' constraints.txt > $(OTHER)/constraints.txt
	@echo "installing PyTorch $(TORCH) and the other dependencies, a few minutes and gigabytes"
	$(OTHER)/bin/pip install --disable-pip-version-check -q -c $(OTHER)/constraints.txt torch==$(TORCH) 'setuptools>=77' wheel
	$(OTHER)/bin/pip install --disable-pip-version-check -q -c $(OTHER)/constraints.txt --no-build-isolation -e '.[dev]' \
	  torch==$(TORCH) $(NEEDED_BY_$(TORCH))
	touch $@

test-torch: $(if $(TORCH),$(OTHER)/.ready)  ## Run the tests with another PyTorch: make test-torch TORCH=2.15.0
	@test -n "$(TORCH)" || { echo "which? make test-torch TORCH=2.15.0"; exit 1; }
	$(OTHER)/bin/pytest -n auto --maxprocesses 4

# The Python that has the GPU's PyTorch: a device's own, or .venv's where that is a CUDA build.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu:  ## Measure everything that a GPU can prove, and say which claims hold (10 minutes; needs CUDA)
	$(GPU_PYTHON) benchmarks/gpu/run.py

bench: $(READY)  ## Run the CPU benchmarks and print their tables (ROUNDS=5: quicker, noisier)
	@for one in linear spelling siblings train swap adapters fold onnx; do \
	  $(BIN)/python benchmarks/bench_$$one.py $(if $(ROUNDS),--rounds $(ROUNDS)) || exit 1; done
	@for one in memory pool compile engine cold; do $(BIN)/python benchmarks/bench_$$one.py || exit 1; done

# setuptools maps passes/ and exporters/ into the package, mypy sees them there by links; and only from another folder.
lint: $(READY)  ## Check style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@rm -rf $(VENV)/typed && mkdir -p $(VENV)/typed/onelora_compile
	@ln -s "$(CURDIR)"/onelora_compile/* "$(CURDIR)/passes" "$(CURDIR)/exporters" $(VENV)/typed/onelora_compile
	cd $(VENV) && MYPYPATH=typed bin/mypy --config-file ../pyproject.toml typed/onelora_compile ../tests ../benchmarks

docs: $(READY)  ## Build the documentation into site/
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt --no-build-isolation -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) $(VENV)-torch-* $(RUNTIMES) $(SERVERS) build dist *.egg-info site .mypy_cache .ruff_cache .hypothesis onelora-demo
