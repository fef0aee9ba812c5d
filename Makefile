# make demo   the whole story on small checkpoints       make test   every check that CI makes
# make bench  figures beside peers and the disk          make fmt    format everything
# make stubs  regenerate _reasonvec.pyi                  make fuzz   each fuzz target for a minute
# make agreement  our merges against mergekit's own runs
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := demo

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
INSTALL := VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet
STUB := python/reasonvec/_reasonvec.pyi
SOURCES := $(shell find rust -name '*.rs') Cargo.toml Cargo.lock pyproject.toml

.PHONY: demo test test-rust test-python test-quick lint stubs check-stubs build bench agreement kernels fmt fuzz clean

demo: build
	$(BIN)/reasonvec demo demo

test: lint test-rust test-python

# uv comes from PyPI into the environment itself: it installs torch in seconds where pip takes minutes.
$(UV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

$(VENV)/.build: $(UV) pyproject.toml
	$(INSTALL) --group build
	touch $@

$(VENV)/.test: $(VENV)/.build
	$(INSTALL) --group test
	touch $@

$(VENV)/.models: $(VENV)/.test
	$(INSTALL) --group models
	touch $@

$(VENV)/.bench: $(VENV)/.models
	$(INSTALL) --group bench
	touch $@

$(VENV)/.extension: $(VENV)/.build $(SOURCES)
	VIRTUAL_ENV=$(VENV) PATH="$(abspath $(BIN)):$$PATH" $(BIN)/maturin develop --release --uv --quiet
	touch $@

build: $(VENV)/.extension

lint: $(VENV)/.bench build
	cargo fmt --check
	cargo clippy --all-targets --no-default-features --quiet -- -D warnings
	cargo clippy --quiet -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) check-stubs

test-rust:
	if cargo nextest --version >/dev/null 2>&1; then cargo nextest run --no-default-features --no-fail-fast; else cargo test --no-default-features; fi

test-python: $(VENV)/.models build
	$(BIN)/python -m pytest -n 2

# The part that needs no torch: a minute after a change.
test-quick: $(VENV)/.test build
	$(BIN)/python -m pytest -n 2 -m "not models"

# From a dev build: only what the extension says of itself is read.
$(VENV)/stubs/_reasonvec.pyi: $(VENV)/.build $(SOURCES) scripts/stubs.py
	rm -rf $(VENV)/stubs
	$(BIN)/maturin generate-stubs --features stubs --quiet --out $(VENV)/stubs
	$(BIN)/python scripts/stubs.py $(VENV)/stubs $@

stubs: $(VENV)/stubs/_reasonvec.pyi
	cp $< $(STUB)

check-stubs: $(VENV)/stubs/_reasonvec.pyi
	diff $(STUB) $<

bench: $(VENV)/.bench build
	$(BIN)/python benches/compare.py
	$(BIN)/python benches/merges.py
	$(BIN)/python benches/spectral.py

# mergekit brings its own torch, so this needs no other.
agreement: $(VENV)/.test build
	$(BIN)/python benches/peers.py
	$(BIN)/python -m pytest tests/python/test_mergekit_agreement.py

kernels:
	cargo bench --no-default-features --bench kernels

fmt: $(VENV)/.build
	cargo fmt
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz:
	cd fuzz && for target in $$(cargo +nightly fuzz list); do mkdir -p corpus/$$target && cargo +nightly fuzz run $$target corpus/$$target seeds/$$target -- -max_total_time=60 -timeout=10; done

clean:
	rm -rf $(VENV) target demo benches/.cache
