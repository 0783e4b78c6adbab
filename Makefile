# `make demo` and `make test` need Python 3.11+ and a C++20 compiler, and nothing else.
PYTHON ?= python3
VENV ?= .venv
# What pip is given for torch.  pip's default on Linux is the CUDA build, gigabytes of it.  The CPU build comes from
# an index that PyTorch's installation page names, through pip's own variable, or from a wheel that lies on the disk:
#   make demo PIP_EXTRA_INDEX_URL=URL        make demo TORCH=path/to/torch.whl
TORCH ?= torch
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CSRC_BUILD := build/csrc
FUZZ_BUILD := build/fuzz
FUZZ_S ?= 20
GPU_BENCHES := masked_mean contrastive_reward info_nce token_logp linear_logp policy_head packed_forward
CPU_BENCHES := $(GPU_BENCHES) grace_step

.PHONY: help demo test test-csrc test-native mutation lint bench evidence gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train GRACE on a small world and show what it learnt (CPU, minutes)"
	@echo "               again: show it again, or go on; ARGS='--output-dir runs/NEW' starts afresh"
	@echo "make test      C++ and Python tests, JOBS=2 processes of them (10 minutes)"
	@echo "make test-native  the C++ tests and random calls and snapshots under sanitizers, FUZZ_S=20 seconds of each"
	@echo "make mutation  proof that the tests notice each of many broken lines (an hour; ARGS='--only forest grace_rewards')"
	@echo "make lint      formatting, lints and types"
	@echo "make bench     speed and memory beside the peers, into bench/results/"
	@echo "make evidence  the three-seed tables of docs/"
	@echo "make gpu       GPU tests and benches with the Python that is active; installs nothing else"
	@echo
	@echo "The first call installs into $(VENV). PIP_EXTRA_INDEX_URL=URL or TORCH=WHEEL behind a target takes the CPU"
	@echo "build of torch from there instead of gigabytes of CUDA; URL: the CPU index on PyTorch's installation page."

$(INSTALLED): pyproject.toml constraints.txt csrc/CMakeLists.txt csrc/src/*.?pp csrc/include/tercet/*.hpp bindings/*.?pp
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip -c constraints.txt
	@echo "installing $(TORCH) and the rest into $(VENV): minutes, 3 GB with the CPU build; make help says how to get torch without CUDA"
	$(BIN)/pip install -q -c constraints.txt $(TORCH) scikit-build-core pybind11 cmake ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev,eval]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/tercet demo grace $(ARGS)

test: $(INSTALLED) test-csrc
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

test-csrc: $(INSTALLED)
	$(BIN)/cmake -S csrc -B $(CSRC_BUILD) -DTERCET_BUILD_TESTS=ON -DTERCET_SANITIZE=ON -DCMAKE_BUILD_TYPE=Debug
	$(BIN)/cmake --build $(CSRC_BUILD)
	$(BIN)/ctest --test-dir $(CSRC_BUILD) --output-on-failure

test-native: test-csrc
	$(BIN)/cmake -S csrc -B $(FUZZ_BUILD) -DTERCET_BUILD_TESTS=ON -DTERCET_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(BIN)/cmake --build $(FUZZ_BUILD) --target fuzz_tell fuzz_snapshot
	$(FUZZ_BUILD)/fuzz_tell -max_total_time=$(FUZZ_S)
	$(FUZZ_BUILD)/fuzz_snapshot -max_total_time=$(FUZZ_S)

mutation: $(INSTALLED)
	$(BIN)/python tests/mutation.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.hpp')
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(INSTALLED)
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]' --no-build-isolation
	for op in $(or $(OPS),$(CPU_BENCHES)); do $(BIN)/python bench/$$op.py || exit 1; done

evidence: $(INSTALLED)
	$(BIN)/tercet demo grace --evidence
	$(if $(GSM8K),$(BIN)/tercet grace experiment --config configs/grace_gsm8k.yaml --data $(GSM8K),@echo "set GSM8K=path/to/gsm8k_test.jsonl for the real-text table")

gpu:
	$(PYTHON) -m pip install --no-build-isolation --no-deps -q -e .
	$(PYTHON) -P -m pytest -W default -m gpu tests
	for op in $(GPU_BENCHES); do $(PYTHON) bench/$$op.py || exit 1; done

clean:
	rm -rf build $(VENV)
