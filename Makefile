# make demo: install into .venv and show the tool at work. make test: the whole suite. make check: everything static.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Not --quiet: for the tests, PyTorch is a download of hundreds of megabytes, and somebody is waiting.
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# Tests start the command line hundreds of times, and each start would compile the package again.
unexport PYTHONDONTWRITEBYTECODE
SOURCE := pyproject.toml constraints.txt hatch_build.py compile_loops.py $(wildcard schemas/*) $(wildcard loraformat/arithmetic/*.[ch] loraformat/arithmetic/*/*.h)

.PHONY: demo test check docs browser bench fuzz mutants
.PHONY: test-architectures test-core test-diffusers test-spellings test-engines test-oracles test-llamacpp
.PHONY: test-ray test-s3 test-browser release-check lock
.PHONY: clean

demo: $(VENV)/installed
	$(BIN)/loraformat demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2

# Every class that the installed transformers builds from a tiny config; minutes, and no part of the suite.
test-architectures: $(VENV)/installed-test
	$(BIN)/python tests/scan_architectures.py

# What the libraries of the quantization schemes write and read back.
test-oracles: $(VENV)/installed-test
	$(PIP) -e '.[oracles]'
	$(BIN)/python -m pytest -m oracle

# Programs that load adapters: MLX-LM on the CPU, LitGPT (which asks for another version of transformers than its code
# needs), and vLLM's loader where LORAFORMAT_VLLM names a folder with its source.
test-engines: $(VENV)/installed-test
	$(PIP) -e '.[engines]'
	$(PIP) --no-deps litgpt==0.5.13 lightning==2.6.6 lightning-utilities==0.15.3 pytorch-lightning==2.6.6 \
		torchmetrics==1.9.0 jsonargparse==4.53.0 typeshed-client==2.15.0 docstring-parser==0.18.0
	$(BIN)/python -m pytest -m engine -rs

# The engine that GGUF files are for, against un-merged PEFT models: adapters and merged files of ours.
test-llamacpp: $(VENV)/installed-test
	$(PIP) -e '.[llamacpp]'
	$(BIN)/python -m pytest -m llamacpp -rA

# diffusers loads what is written, into tiny models of every family, and the table of names is that of its classes.
test-diffusers: $(VENV)/installed-test
	$(PIP) -e '.[diffusers]'
	$(BIN)/python tests/derive_families.py --check
	$(BIN)/python -m pytest -m diffusers

# Workers of a Ray cluster of two nodes on this machine, of which one worker and one node are killed; 240 MB of Ray.
test-ray: $(VENV)/installed-test
	$(PIP) -e '.[ray]'
	$(BIN)/python -m pytest -m ray -n 0

# What diffusers makes of every spelling of every family, against the table behind --target diffusers; half an hour.
test-spellings: $(VENV)/installed-test
	$(PIP) -e '.[diffusers]'
	$(BIN)/python tests/derive_diffusers.py --check

# A real S3 service, Ceph's: Debian's packages are downloaded into a folder that is kept (LORAFORMAT_CEPH), not installed.
test-s3: $(VENV)/installed-test
	$(BIN)/python -m pytest -m s3 -n 0 -rA

# That page in headless Chromium, against the command line.
test-browser: browser
	$(BIN)/python -m pytest -m browser -n 0 -rA

# The core alone, without PyTorch, in an environment of its own for each Python at hand; minutes.
test-core: $(VENV)/installed
	$(BIN)/python tests/core_install.py

# What a release needs, without publishing it: archive, wheels, what is in them, fresh installations; minutes, and 100 MB
# of Zig for the wheels of other platforms. TAG=v0.1.0, a variable that the script reads, checks that this version can be
# released.
release-check: $(VENV)/installed
	$(PIP) -e '.[release]'
	$(BIN)/python release/check.py

# What the action and the wheels of a release are made of: the hashes of all files of the versions in constraints.txt. A
# Python from 3.11 on makes it.
LOCK := UV_CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/uv pip compile --quiet --universal --python-version 3.10 \
	--no-python-downloads --no-annotate --generate-hashes --constraint constraints.txt
BUILD_REQUIRES := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")
lock: $(BIN)/python
	$(PIP) uv
	$(LOCK) --output-file .github/lock/core.txt pyproject.toml
	$(BIN)/python -c '$(BUILD_REQUIRES)' | $(LOCK) --output-file .github/lock/build.txt -

# Changes in the source, one at a time, that a test should notice: 400 drawn by the commit. More than an hour.
mutants: $(VENV)/installed-test
	$(PIP) -e '.[mutants]'
	$(BIN)/python tests/mutants.py --trace
	$(BIN)/python tests/mutants.py --seed $$(git rev-parse --short=8 HEAD)

# Most measurements, one after the other; an hour, on a machine that does nothing else. BENCH= names some of them.
BENCH ?= start_up validate inspection merge merge_gguf merge_single_file quantized algebra extract image_adapters retention
bench: $(VENV)/installed-test
	for each in $(BENCH); do echo "== $$each"; $(BIN)/python benchmarks/$$each.py || exit 1; done

# Every reader of untrusted bytes against changed inputs; what is found lands in tests/fuzz/found/. SECONDS for each run.
SECONDS ?= 600
fuzz: $(VENV)/installed-test
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS)

# The site of docs/, into site/: search works without a network. Warnings and links that lead nowhere end it. Without
# npm there is a notice in the place of the page that checks adapters.
docs: $(VENV)/installed-dev
	rm -rf site
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs site
	rm -rf site/.doctrees
	$(BIN)/python web/build.py --optional site/browser
	$(BIN)/python docs/check.py site

# The page that checks adapters in a browser; npm downloads its runtime once, 6.5 MB, into build/.
browser: $(VENV)/installed-dev
	$(BIN)/python web/build.py site/browser

check: docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) dist build site

$(BIN)/python:
	@echo "make: a virtual environment in $(VENV), then pip, which shows what it downloads"
	$(PYTHON) -m venv $(VENV)

# Editable, so that a change of the source needs no new installation.
$(VENV)/installed: $(SOURCE) | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/installed-test: $(SOURCE) | $(BIN)/python
	$(PIP) -e '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-dev: $(SOURCE) | $(BIN)/python
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/installed-test $(VENV)/installed
