"""A vLLM plugin for tests: the process that computes a poisonous picture dies, or breaks.

vLLM loads it wherever this directory is on PYTHONPATH: in the driver, in the engine's process, in workers.
A picture is poisonous when every pixel has the colour POISON (of a model that scales pixels to [-1, 1]).

    CASCACHE_TEST_POISON=abort      SIGABRT, as from a failed assertion in a kernel
    CASCACHE_TEST_POISON=raise      a Python error in the worker
    CASCACHE_TEST_POISON=all        SIGABRT on every picture but vLLM's own at its start
    CASCACHE_TEST_POISON=           as if it were not there
"""

import os
from typing import Any

POISON = (120, 200, 40)
"""RGB."""
_DUMMY = (255, 0, 0)
"""What vLLM profiles with."""


def install() -> None:
    """Look at every picture before LLaVA computes it."""
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    inner = LlavaForConditionalGeneration._image_pixels_to_features

    def guarded(self: Any, vision_tower: Any, pixel_values: Any) -> Any:
        kind = os.environ.get("CASCACHE_TEST_POISON")
        for each in pixel_values if kind else ():
            if _is_plain(each, POISON) or (kind == "all" and not _is_plain(each, _DUMMY)):
                if kind == "raise":
                    raise RuntimeError("poisonous picture")
                os.abort()
        return inner(self, vision_tower, pixel_values)

    LlavaForConditionalGeneration._image_pixels_to_features = guarded


def _is_plain(pixels: Any, colour: tuple[int, int, int]) -> bool:
    wanted = pixels.new_tensor(colour)[:, None, None] / 127.5 - 1
    return bool(((pixels - wanted).abs() < 0.01).all())
