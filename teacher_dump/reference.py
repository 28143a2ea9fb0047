"""The teacher through transformers: the slow reference that an audit compares a cache with.

    token ids, images ──> body in `dtype` ──> states [T, D] ──rows asked for──> logits in `head_dtype`

Logits exist for the rows asked for alone, and the head's weight is widened a slice at a time: beside the
weights in their own dtype there is room for one sequence.

Axes: T positions, N rows, V real tokens, D width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.chat import image_token_id
from common.errors import ConfigError
from common.relation import head_gram

if TYPE_CHECKING:
    from PIL.Image import Image

_TEXT_KEYS = frozenset({"input_ids", "attention_mask"})
_TYPE_KEYS = frozenset({"mm_token_type_ids", "token_type_ids"})
_HEAD_ROWS = 16384


class Reference:
    """A model of transformers and its processor."""

    def __init__(
        self,
        path: Path,
        processor: Any,
        *,
        vocab_size: int,
        dtype: str = "float32",
        head_dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        """Load the weights.

        Args:
            path: Directory of the model.
            processor: Its processor.
            vocab_size: Real tokens.
            dtype: Of weights and states.
            head_dtype: Of the head's product.
            device: As torch names it, or `auto` to spread the layers over all GPUs.

        Raises:
            ConfigError: transformers cannot load it.
        """
        from transformers import AutoModelForImageTextToText

        try:
            model = AutoModelForImageTextToText.from_pretrained(
                path, dtype=getattr(torch, dtype), **({} if device == "cpu" else {"device_map": device})
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"transformers cannot load {path} ({error}); name the teacher with --model"
            ) from error
        self._model = model.eval()
        self._device = model.device
        self._processor, self._vocab_size = processor, vocab_size
        self._head_dtype = getattr(torch, head_dtype)
        self._soft_cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @torch.inference_mode()
    def states(self, token_ids: NDArray[np.int32], images: Sequence["Image"]) -> Tensor:
        """[T, D] states after the last norm, of an expanded sequence with its images.

        Args:
            token_ids: [T] as a record holds them.
            images: Decoded, in order.
        """
        ids = torch.from_numpy(np.array(token_ids, np.int64))[None]
        inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            text = "\n".join([self._processor.image_token] * len(images))
            features = self._processor(text=[text], images=list(images), return_tensors="pt")
            inputs |= {name: value for name, value in features.items() if name not in _TEXT_KEYS | _TYPE_KEYS}
            marks = (ids == image_token_id(self._processor)).long()
            inputs |= dict.fromkeys(_TYPE_KEYS & set(features), marks)
        on_device = {name: value.to(self._device) for name, value in inputs.items()}
        found: Tensor = self._model.base_model(**on_device).last_hidden_state[0]
        return found

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """[N, V] float32 logits of [N, D] states, on the CPU."""
        head = self._model.get_output_embeddings()
        weight, bias = head.weight[: self._vocab_size], getattr(head, "bias", None)
        wide = states.to(weight.device, self._head_dtype)
        pieces = [
            wide @ weight[start : start + _HEAD_ROWS].to(self._head_dtype).T
            for start in range(0, len(weight), _HEAD_ROWS)
        ]
        logits = torch.cat(pieces, -1)
        if bias is not None:
            logits = logits + bias[: self._vocab_size].to(logits.dtype)
        if self._soft_cap:
            logits = torch.tanh(logits / self._soft_cap) * self._soft_cap
        return logits.float().cpu()

    @torch.inference_mode()
    def gram(self) -> Tensor:
        """[D, D] M = WᵀW of the real rows of the head, in float32."""
        return head_gram(self._model.get_output_embeddings().weight[: self._vocab_size]).cpu()
