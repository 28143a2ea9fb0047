"""The teacher through transformers, in float32: the slow twin that an audit compares a cache with."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Forward(NamedTuple):
    """One sequence's outputs. Axes: T positions, V real tokens, D width."""

    logits: Tensor
    """[T, V] float32."""
    hidden: Tensor
    """[T, D] states after the last norm."""


class Reference:
    """A model of transformers and its processor."""

    def __init__(self, path: Path, processor: Any, *, vocab_size: int, dtype: str = "float32") -> None:
        """Load the weights.

        Args:
            path: Directory of the model.
            processor: Its processor.
            vocab_size: Real tokens.
            dtype: What it computes in.

        Raises:
            ConfigError: transformers cannot load it.
        """
        from transformers import AutoModelForImageTextToText

        try:
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=getattr(torch, dtype))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"transformers cannot load {path} ({error}); name the teacher with --model"
            ) from error
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().to(self._device)
        self._processor, self._vocab_size = processor, vocab_size

    @torch.inference_mode()
    def forward(self, token_ids: NDArray[np.int32], images: Sequence["Image"]) -> Forward:
        """Compute an expanded sequence with its images.

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
        output = self._model(
            **{name: value.to(self._device) for name, value in inputs.items()}, output_hidden_states=True
        )
        logits = output.logits[0, :, : self._vocab_size].float().cpu()
        return Forward(logits, output.hidden_states[-1][0].float().cpu())

    @torch.inference_mode()
    def gram(self) -> Tensor:
        """[D, D] M = WᵀW of the real rows of the head."""
        return head_gram(self._model.get_output_embeddings().weight[: self._vocab_size]).cpu()
