# Every target sets up what it needs; an environment that is already right costs a moment.
PYTHON ?= python3
VENV := .venv
VLLM ?= 0.31.0
CONTRACT_VENV := .venv-$(basename $(VLLM))

.PHONY: help setup demo test nightly gpu sanitize lint contract clean

help:
	@echo "make demo                   serve the tiny model on a CPU and compare the modes"
	@echo "make test                   ruff, mypy and the tests that need no GPU"
	@echo "make gpu                    the tests that need a GPU"
	@echo "make sanitize               a small sweep of the kernels under compute-sanitizer, on a GPU"
	@echo "make nightly                the long tests: 2,000-request fuzz, reference model, processes"
	@echo "make contract VLLM=0.31.0   tests/contract and tests/scheduler against another vLLM (0.31.0, 0.33.0)"
	@echo "make lint                   ruff and mypy only"
	@echo "make clean                  remove the environments and caches"

setup:
	$(PYTHON) requirements/install_cpu.py --venv $(VENV)

demo: setup
	$(VENV)/bin/echokv demo

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# Two processes with one thread each: the tests start many small engines, which gain nothing from
# more threads. A file stays in one process, so its engines are shared. vLLM must not pin both
# processes to the same core.
test: lint
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
		$(VENV)/bin/pytest -n 2 --dist loadfile -m "not gpu and not nightly"

nightly: setup
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
		$(VENV)/bin/pytest -n 2 --dist loadfile -m "nightly and not gpu"

# Uses the environment it is called from: a GPU host has vLLM and torch for CUDA installed.
gpu:
	$(PYTHON) -m pip install --no-deps --quiet .
	pytest -n 4 --dist loadfile -m gpu

# Every kernel at a few shapes; each launch takes many times as long as without. PyTorch's cache of
# freed memory would hide what lies outside a tensor.
SWEEP := plain or parts or stamped or both_groups or random_batches or softmax or \
	matches_reference or prefill_tile
sanitize:
	$(PYTHON) -m pip install --no-deps --quiet .
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(PYTHON) -m pytest -n 8 -m gpu -k "cuda and ($(SWEEP))" tests/kernels/gpu

# Both: our managers run inside vLLM's KVCacheManager, and signatures do not show the order in
# which it calls them.
contract:
	$(PYTHON) requirements/install_cpu.py --venv $(CONTRACT_VENV) --vllm $(VLLM)
	$(CONTRACT_VENV)/bin/pytest tests/contract tests/scheduler -m "not nightly"

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache
