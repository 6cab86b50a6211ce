# make demo: everything from nothing, on the embedded data. make help: the other targets.
CONFIG ?= configs/demo.yaml
ARGS ?=
PYTHON ?= python3
# the cores that may be used; where there is no nproc (macOS), all
JOBS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
LAUNCH ?= $(BIN)/python
BIN := .venv/bin
INSTALLED := .venv/installed
STAGE = $(LAUNCH) stages/$(1).py --config $(CONFIG) $(ARGS)
PARTS = $(shell $(BIN)/python -m llmkd.stage $(1) $(CONFIG) $(ARGS))
# With -j the models, teachers and folds of a stage run side by side first, each in a process of its own.
.SECONDEXPANSION:
SPLIT = $(if $(filter -j%,$(MAKEFLAGS)),$(addprefix $(1)/,$(call PARTS,$(2))))

.PHONY: help demo install prepare pretrain teachers distill merge quantize evaluate run test test-all docs-check soak bench check lint types clean
help:
	@echo "make demo                     all seven stages on the embedded data"
	@echo "make prepare ... evaluate     one stage after the other (CONFIG=configs/x.yaml ARGS='seed=2')"
	@echo "make -j4 teachers distill     teachers and folds side by side"
	@echo "make test | check             the tests | ruff, types and tests"
	@echo "make docs-check | bench       the documented commands | measured side by side with others"

# Its models are so small that a core each, side by side, is faster than all cores for one.
demo: install
	OMP_NUM_THREADS=1 $(BIN)/llmkd run --config $(CONFIG) -j $(JOBS) \
		$(if $(filter-out $(BIN)/python,$(LAUNCH)),--launch "$(LAUNCH)") $(ARGS)

install: $(INSTALLED)
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	CUDA_HOME= DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip install -q -c constraints.txt torch==2.13.0
	CUDA_HOME= DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip install -q -c constraints.txt -e .[dev]
	touch $(INSTALLED)

prepare: install
	$(call STAGE,00_prepare)
pretrain: prepare $$(call SPLIT,pretrain,models)
	$(call STAGE,01_pretrain)
teachers: pretrain $$(call SPLIT,teachers,teachers)
	$(call STAGE,02_teachers)
distill: teachers $$(call SPLIT,distill,folds)
	$(call STAGE,03_distill)
merge: distill
	$(call STAGE,04_merge)
quantize: merge
	$(call STAGE,05_quantize)
evaluate: quantize
	$(call STAGE,06_evaluate)
run: evaluate

# Parts of a stage, as `make -j` runs them: pretrain/gemma, teachers/llama:0, distill/3
pretrain/%: | prepare
	$(call STAGE,01_pretrain) --model $*
teachers/%: | pretrain
	$(call STAGE,02_teachers) --teacher $(firstword $(subst :, ,$*)) --fold $(lastword $(subst :, ,$*))
distill/%: | teachers
	$(call STAGE,03_distill) --fold $*

test: install
	$(BIN)/python -m pytest -q -n 2
test-all: install
	$(BIN)/python -m pytest -q -m "slow or not slow"
# The commands of README.md, docs/ and benchmarks/README.md, executed as they are written
docs-check: install
	$(BIN)/python -m pytest -q -n 2 -m "slow or not slow" -o faulthandler_timeout=0 tests/test_docs.py tests/test_docs_run.py
# Side by side with what people would use instead; a table in the end.
# ARGS="--quick" shows that they run; ARGS="--prefs a.parquet --imdb b.parquet --environments DIRECTORY" measures
# (hours; less with --short --threads 4)
bench: install
	$(BIN)/python benchmarks $(ARGS)
# kill -9 at random moments, start again, compare with the run that nothing disturbed
KILLS ?= 100
soak: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/soak.py --kills $(KILLS) --config $(CONFIG) $(ARGS)
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
types: install
	$(BIN)/mypy
check: lint types test
clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
