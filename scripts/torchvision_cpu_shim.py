"""Lets PyPI's CUDA-built torchvision import under a CPU build of torch.

The wheel's compiled operators cannot load there, and torchvision then fails while registering fakes
for `nms` and `qnms`. Declaring the two operators just before the import is enough: nothing here calls them.
Installed as a `.pth` start-up hook by scripts/setup.sh, because vLLM starts interpreters of its own.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


class _DeclareOperators:
    """A finder that finds nothing: it acts once, when torchvision is first asked for."""

    done = False

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision" and not _DeclareOperators.done:
            _DeclareOperators.done = True
            import torch

            if torch.version.cuda is None:
                for operator in ("nms", "qnms"):
                    torch.library.define(
                        f"torchvision::{operator}",
                        "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                    )
        return None


sys.meta_path.insert(0, _DeclareOperators())
