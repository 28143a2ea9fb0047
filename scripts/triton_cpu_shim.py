"""Lets vLLM's V2 model runner, which is made for GPUs, run on a CPU: thirty times slower, for tests.

Its kernels are Triton's. vLLM takes a Triton that has a backend named "cpu", which PyPI's has not;
declaring one is enough, because Triton's interpreter runs the kernels in numpy and compiles nothing.

scripts/setup.sh puts this file and Triton into `.venv/triton`, this one as `sitecustomize.py`. A process
with that directory on its PYTHONPATH runs V2, and so do the workers it starts; no other process knows.
"""

import importlib
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Driver:
    """As much of a driver as is asked for when vLLM is imported."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cpu", 0, 0)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        return importlib.import_module("torch").device("cpu")

    def get_device_interface(self) -> Any:
        return importlib.import_module("torch").cpu

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


class _DeclareBackend:
    """A finder that finds nothing: it acts once, when vLLM is first asked for."""

    done = False

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "vllm" and not _DeclareBackend.done:
            _DeclareBackend.done = True
            backends = importlib.import_module("triton.backends").backends
            backends["cpu"] = type("Backend", (), {"driver": _Driver, "compiler": None})
            importlib.import_module("triton.runtime.driver").driver.set_active(_Driver())
        return None


if __name__ == "sitecustomize":
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    sys.meta_path.insert(0, _DeclareBackend())
