# Each target makes its own environment in .venv; a Linux machine with Python 3.11-3.14 needs nothing else.
#   make demo                     three models decode Python prompts together, every method in one table
#   make test [PROMPTS=DIR]       the tests; DIR holds prompt sets for those that want them
#   make equality PROMPTS=DIR     every HumanEval prompt, every method, against Hugging Face
PYTHON ?= python3
PROMPTS ?=
ENV := .venv
RUN := $(ENV)/bin/python

.PHONY: demo test lint equality clean

$(ENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(ENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".[test,bench]"
	touch $@

demo: $(ENV)/.installed
	$(RUN) -m decoding compare --hf --color

test: $(ENV)/.installed lint
	$(RUN) -m pytest tests $(if $(PROMPTS),--prompts=$(PROMPTS))

lint: $(ENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

equality: $(ENV)/.installed
	$(RUN) -m profiling.equality --prompts $(or $(PROMPTS),$(error PROMPTS=DIR names the folder with humaneval/HumanEval.jsonl.gz))

clean:
	rm -rf $(ENV) build dist *.egg-info
