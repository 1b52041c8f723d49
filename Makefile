# make run     the demo: environment, embedded models, stages 2 to 5 on three prompt files, report
# make test    every check and test
# make stress  the long tests (minutes to hours)
# make clean   remove the demo's outputs and results and the tools' caches (your own runs, models/ and .venv stay)
#
# Another Python:        make run PYTHON=/path/to/python3.12
# A reward model, too:   make run REWARD_MODEL=OpenAssistant/reward-model-deberta-v3-large-v2
# pip's own environment variables (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL ...) hold here as anywhere.

PYTHON ?= python3
WORKERS ?= 2
REWARD_MODEL ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check

PIPELINE := $(PY) 1_utils/run_scripts/run_pipeline.py --run_name demo --workers $(WORKERS) --shards $(WORKERS) \
  --model_name models/SmolLM2-135M-Instruct --lens_rows 20 \
  --probe_layers 0 5 10 15 20 25 30 $(if $(REWARD_MODEL),--reward_model "$(REWARD_MODEL)")
PATCHES := --max_samples 32 --sites resid_pre --layers 0 3 6 9 12 15 18 21 24 27 --response_tokens 4 --controls other
CAPTURE := --entropy --raw_layers none --pooled_dtype float16

.PHONY: help run test stress clean check
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# Three calls, for facts and maths are completed from shots and instructions are answered in the chat template.
run: $(VENV)/.installed
	@$(PY) 1_utils/run_scripts/fetch_models.py
	@$(PIPELINE) --no_report --prompt_file 0_data/facts.json --max_samples 150 --few_shot_file 0_data/few_shot_facts.txt \
	  --styles normal swap missing typo@1 typo@2 polite split@swap split@typo@1 split@typo@2 neutral@polite \
	  --patch swap --patch_flags '$(PATCHES)' \
	  -- --max_new_tokens 8 $(CAPTURE) --answer_logprobs --neurons --pool_regions last edited:swap
	@$(PIPELINE) --no_report --prompt_file 0_data/instructions.json --max_samples 12 \
	  --styles normal swap three real_word split polite urgent split@swap \
	  -- --max_new_tokens 48 --apply_chat_template $(CAPTURE) --pool_regions last task \
	  edited:swap edited:three edited:real_word edited:split
	@$(PIPELINE) --prompt_file 0_data/maths.json --max_samples 40 --few_shot_file 0_data/few_shot_maths.txt \
	  --styles normal swap three polite split@swap split@three \
	  -- --max_new_tokens 16 $(CAPTURE) --pool_regions last task edited:swap edited:three

# One thread a worker, because the workers share the cores.
test: $(VENV)/.installed-dev check
	@$(PY) 1_utils/run_scripts/fetch_models.py
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not stress"

check: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

stress: $(VENV)/.installed-dev
	@$(PY) 1_utils/run_scripts/fetch_models.py
	$(PY) -m pytest -m stress

clean:
	rm -rf outputs/demo results/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# --- the environment: made once, brought up to date when a requirements file changes

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is missing or older than 3.11; install Python 3.11 or newer, or: make PYTHON=/path/to/python" >&2; \
	  exit 2; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	  || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install --quiet pip; } >/dev/null 2>&1 \
	  || { rm -rf $(VENV); \
	       echo "error: $(PYTHON) can make no virtual environment; on Debian or Ubuntu: sudo apt install python3-venv" >&2; \
	       exit 2; }

# torch comes first and alone: its source (a CPU or CUDA index, a folder) is settled before the rest.
$(VENV)/.installed: requirements.txt | $(PY)
	@echo "installing requirements.txt into $(VENV) (a few minutes the first time)"
	@$(PIP_INSTALL) $$(grep '^torch==' requirements.txt)
	@$(PIP_INSTALL) -r requirements.txt
	@touch $@

# pyarrow lies apart, for the one test that needs it: beside pandas it would change the type of texts for all tests.
$(VENV)/.installed-dev: requirements-dev.txt requirements-optional.txt $(VENV)/.installed
	@$(PIP_INSTALL) --quiet -r requirements-dev.txt
	@$(PIP_INSTALL) --quiet --upgrade --no-deps --target $(VENV)/optional -r requirements-optional.txt
	@touch $@
