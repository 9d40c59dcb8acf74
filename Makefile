# Everything runs inside .venv, which is made when it is missing and again when the requirements change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# DeepSpeed looks for ninja on the path when it compiles its ops.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# One thread per process: two ranks share two cores, and results do not depend on the machine's width.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

RANKS ?= 2
# The demo is for CPUs, whatever the machine has.
DEEPSPEED := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu PYTHONWARNINGS=ignore::FutureWarning $(BIN)/deepspeed --quiet --num_gpus $(RANKS)
DS ?= ds_configs/zero2.json

.PHONY: demo demo-hosts test stress test-gpu check clean

demo: $(READY)
	$(BIN)/python data_tools/make_shards.py --source digits --output demo/shards --val-fraction 0.2 --samples-per-shard 256
	$(DEEPSPEED) launch/pretrain_teacher.py --method mae --recipe launch/recipes/demo_teacher.yaml --ds_config $(DS) run.name=mae
	$(DEEPSPEED) launch/pretrain_teacher.py --method supervised --recipe launch/recipes/demo_teacher.yaml --ds_config $(DS) run.name=supervised
	$(DEEPSPEED) launch/precompute_masks.py --recipe launch/recipes/demo_hybrid.yaml
	$(DEEPSPEED) launch/train.py --recipe launch/recipes/demo_feature_only.yaml --ds_config $(DS)
	$(DEEPSPEED) launch/train.py --recipe launch/recipes/demo_hybrid.yaml --ds_config $(DS)
	$(BIN)/python launch/export.py --run demo/runs/hybrid --output demo/student.safetensors
	$(BIN)/python launch/evaluate.py summary --run demo/runs/feature_only --run demo/runs/hybrid --output demo/summary.json
	@echo
	@echo "run folder:        demo/runs/hybrid"
	@echo "curves:            $(BIN)/tensorboard --logdir demo/runs"
	@echo "exported student:  demo/student.safetensors"

# After `make demo`: its last run again, on two hosts that are made on this machine (root; iproute2, openssh-server, pdsh).
demo-hosts: $(READY)
	$(BIN)/python -m pytest -q -s tests/launch/demo_on_hosts.py

# Two processes: most tests use one core.
test: $(READY)
	$(BIN)/python -m pytest -n 2

# Launches that repeat what quicker tests show, for a machine with time; keep the log of such a run in docs/results/.
stress: $(READY)
	$(BIN)/python -m pytest -m stress

# What only a GPU can show; `make test` is for CPUs, whatever the machine has.
test-gpu: $(READY)
	HDSCALE_TEST_ON_GPU=1 $(BIN)/python -m pytest -m gpu

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/codespell hdscale launch data_tools tests docs README.md

$(READY): requirements.txt requirements-dev.txt pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)

clean:
	rm -rf demo .pytest_cache .ruff_cache .import_linter_cache
