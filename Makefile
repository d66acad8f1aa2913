# Each target makes its own environment in .venv; a Linux machine with Python 3.11-3.14 needs nothing else.
#   make demo                     three models decode Python prompts together, every method in one table
#   make test [PROMPTS=DIR]       the tests, a process on each core; DIR holds prompt sets for those that want them
#   make aot                      machine code for five GPUs, no GPU needed; also with Triton 3.6.0 and the newest one
#   make equality PROMPTS=DIR     every HumanEval prompt, every method, against Hugging Face
#   make paper PROMPTS=DIR        the paper's tables and figures beside peers, in local/paper
#   make kernels                  on a GPU: every operation and whole passes, timed beside what torch offers
#   make tune                     on a GPU: the table of tiles
#   make suite [MINUTES=30]       on a GPU: tests, benchmarks, models and figures in the time there is; again: goes on
#   make mini                     the same in miniature, on a CPU: whether every command still works
PYTHON ?= python3
PROMPTS ?=
MINUTES ?= 30
WORKERS ?= auto
ENV := .venv
RUN := $(ENV)/bin/python

.PHONY: demo test lint aot equality paper kernels tune suite mini clean

$(ENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(ENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".[test,bench,peers]"
	touch $@

demo: $(ENV)/.installed
	$(RUN) -m decoding compare --hf --color

test: $(ENV)/.installed lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests --numprocesses $(WORKERS) --dist worksteal $(if $(PROMPTS),--prompts=$(PROMPTS))

lint: $(ENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Other Tritons live in folders of their own, before the installed one; the newest is skipped where it is installed.
aot: $(ENV)/.installed
	@status=0; $(RUN) -m profiling.aot --check > /dev/null || status=1; \
	installed=$$($(RUN) -c "import triton; print(triton.__version__)"); \
	for wanted in triton==3.6.0 triton; do \
		folder=.aot/$$wanted; \
		$(RUN) -m pip install --quiet --no-deps --upgrade --target $$folder $$wanted || exit 1; \
		version=$$(PYTHONPATH=$$folder $(RUN) -c "import triton; print(triton.__version__)"); \
		test $$version = $$installed || PYTHONPATH=$$folder $(RUN) -m profiling.aot --check > /dev/null || status=1; \
	done; \
	exit $$status

equality: $(ENV)/.installed
	$(RUN) -m profiling.equality --prompts $(or $(PROMPTS),$(error PROMPTS=DIR names the folder with humaneval/HumanEval.jsonl.gz))

paper: $(ENV)/.installed
	$(RUN) -m profiling.paper --out local/paper $(if $(PROMPTS),--prompts $(PROMPTS))

kernels: $(ENV)/.installed
	$(RUN) -m profiling.kernels

tune: $(ENV)/.installed
	$(RUN) -m profiling.tune

suite: $(ENV)/.installed
	$(RUN) -m profiling.suite --budget-minutes $(MINUTES) --out local/suite $(if $(PROMPTS),--prompts $(PROMPTS))

mini: $(ENV)/.installed
	rm -rf local/mini
	$(RUN) -m profiling.suite --mini --budget-minutes 20 --out local/mini

clean:
	rm -rf $(ENV) .aot build dist *.egg-info
	find kernels model decoding -name __pycache__ -prune -exec rm -rf {} +
