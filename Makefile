# Each target sets up .venv by itself; the first run installs 3.9 GB.
PY := .venv/bin/python
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1

.PHONY: demo test bench-head bench-cache bench-student bench-share soak lint types setup clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

setup:  ## create .venv (CPU build)
	@scripts/setup.sh

demo: setup  ## the whole job on small models: dump two levels, train down the cascade, write the report
	@$(PY) -m scripts.demo

test: setup  ## all tests
	@$(PY) -m pytest

bench-cache: setup  ## bytes, errors and read times of the cache beside rivals -> build/bench/cache.json
	@OMP_NUM_THREADS=1 $(PY) -m scripts.bench_cache

bench-student: setup  ## a training step beside plain fine-tuning and online distillation -> build/bench/student.json
	@OMP_NUM_THREADS=1 $(PY) -m scripts.bench_student

bench-share: setup  ## push, pull and streaming beside plain copying over loopback S3 -> build/bench/share.json
	@OMP_NUM_THREADS=1 $(PY) -m scripts.bench_share

soak: setup  ## kills, corruptions, full disks: nothing lost, nothing silently wrong -> build/bench/soak.json
	@$(PY) -m scripts.soak

fuzz: setup  ## two minutes of hostile caches: no crash, no wrong value -> build/bench/fuzz.json
	@OMP_NUM_THREADS=1 $(PY) -m scripts.fuzz_cache

lint: setup  ## ruff
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: setup  ## mypy, strict
	@$(PY) -m mypy

bench-head: setup  ## what the head costs and loses in each dtype -> build/bench/head.json
	@OMP_NUM_THREADS=1 $(PY) -m scripts.bench_head

bench-teacher: setup  ## what the capture costs beside a plain prefill (build/bench/teacher.json)
	@$(PY) -m scripts.bench_teacher

clean:  ## remove what the demo and the benchmarks made
	rm -rf zarr runs build
