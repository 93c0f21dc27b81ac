# make train   set up if needed, then pretrain the default model:  make train ARGS="--help"
# make test    set up if needed, lint, type-check, run the tests;  make test SLOW=1: the slow ones too
# make lint    ruff and mypy only
# make bench   run one benchmark:  make bench NAME=moma_layer
# make setup   only what make train needs
# make clean   remove the environment and caches
#
# PYTHON=/path/to/python3 picks the interpreter; otherwise the newest suitable one is taken.
# TORCH=2.14.1 takes that torch and its triton instead of the pinned ones, in an environment of its own.

SHELL := bash
TORCH ?=
VENV := .venv$(if $(TORCH),-torch$(TORCH))
CONSTRAINTS := $(if $(TORCH),$(VENV)/)constraints.txt
BIN := $(VENV)/bin
PYTHON ?=
ARGS ?=
WORKERS ?= 2
SLOW ?=
FOLDERS := configs data kernels models parallel tools
TYPES := $(VENV)/types
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -qq -c $(CONSTRAINTS)

# large tensors on huge pages, as train.py has them
export THP_MEM_ALLOC_ENABLE ?= 1

.PHONY: train test pytest lint bench setup clean
.DELETE_ON_ERROR:

train: setup
	@$(BIN)/python train.py $(ARGS)

setup: $(VENV)/installed

# beside each other: the type checker keeps one core busy
test: $(VENV)/installed-test
	@$(MAKE) --no-print-directory -j2 lint pytest

pytest: $(VENV)/installed-test
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  $(if $(SLOW),,-m "not slow") $(ARGS)

lint: $(VENV)/installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@set -o pipefail; MYPYPATH=$(TYPES):benchmarks $(BIN)/mypy -p earlyfuse -m train \
	  $(patsubst benchmarks/%.py,-m %,$(wildcard benchmarks/*.py)) \
	  | sed 's|^$(TYPES)/earlyfuse/||'

bench: setup
	@$(BIN)/python benchmarks/$(NAME).py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# "installing" is there while packages change: found again, it tells of an interrupted installation, whose
# environment is made anew.
$(VENV)/installed: $(VENV)/made pyproject.toml $(CONSTRAINTS)
	@echo "Installing earlyfuse into $(VENV) (some minutes the first time)"
	@touch $(VENV)/installing
	@$(INSTALL) -e .
	@rm $(VENV)/installing
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "Installing what the tests need into $(VENV)"
	@touch $(VENV)/installing
	@$(INSTALL) -e '.[test,lint]'
	@rm $(VENV)/installing
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/earlyfuse
	@for folder in $(FOLDERS); do ln -s ../../../$$folder $(TYPES)/earlyfuse/$$folder; done
	@touch $@

# torch itself asks for the triton that goes with it
$(VENV)/constraints.txt: constraints.txt $(VENV)/made
	@sed -e 's/^torch==.*/torch==$(TORCH)/' -e '/^triton==/d' $< >$@

ifneq ($(wildcard $(VENV)/installing),)
.PHONY: $(VENV)/made
endif

# A suitable Python is at least 3.11 and can make virtual environments with pip.
$(VENV)/made:
	@found=; old=; bare=; \
	for python in $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3 python); do \
	  version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	  if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    old="$${old:-$$python is $$version}"; \
	  elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	    bare="$${bare:-$$version}"; \
	  else found=$$python; break; fi; \
	done; \
	if [ -n "$$found" ]; then \
	  echo "Making $(VENV) with $$found ($$version)"; \
	  "$$found" -m venv --clear $(VENV) && touch $@; \
	elif [ -n "$$bare" ]; then \
	  echo "Python $$bare has no venv module: install it (on Debian and Ubuntu: apt install python$$bare-venv)." >&2; exit 1; \
	elif [ -n "$$old" ]; then \
	  echo "earlyfuse needs Python 3.11 or newer, but $$old: install one, or name it with make PYTHON=/path/to/python3." >&2; exit 1; \
	else \
	  echo "$(or $(PYTHON),python3) was not found: install Python 3.11 or newer, or name it with make PYTHON=/path/to/python3." >&2; exit 1; \
	fi
