# What people run here; `just` lists it. CI runs more: `bash .ci/run`.

set positional-arguments

_list:
    @just --list --unsorted

# install both frameworks, Triton and the tools into .venv
setup:
    uv sync

# run all tests; without a GPU, those of the kernels on one count as skipped
test *options:
    uv run pytest "$@"

# run the tests of one file or folder, in one process: just test-file tests/gather -k fp8
test-file path *options:
    uv run pytest -n 0 "$@"

# check rules, format and types
lint:
    uv run ruff check .
    uv run ruff format --check .
    uv run pyright

# build the site into site/, without a warning
docs:
    uv run python docs/_hooks.py
    uv run --group docs mkdocs build --strict

# run the tests that need an NVIDIA GPU
gpu *options:
    uv run --extra cuda13 pytest -m gpu "$@"

# build what is published, and try it in clean environments: PYTHONS=3.12 just release
release *options:
    bash .ci/release "$@"

# measure: just benchmark write --json FILE; without a name it lists what there is
benchmark *name:
    uv run python -m benchmarks "$@"
