"""Padded heads: which rows of two models' heads speak of the same tokens.

A head has more rows than its tokenizer has tokens: padding to a round number. Qwen2.5 pads its 151,665
tokens to 151,936 rows up to 3B and to 152,064 from 7B on, and a cascade crosses that boundary.

    teacher   [ real rows 0 .. size ) [ padding ......... 152,064 )
    student   [ real rows 0 .. size ) [ padding .. 151,936 )

Only real rows take part: the student's softmax ends at `size`, and no kept id may lie at or above it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import MismatchError


class Vocabulary(NamedTuple):
    """The rows of one model's head."""

    rows: int
    """Rows of the head, padding included."""
    size: int
    """Real tokens; ids at and above it never occur in text."""


def shared_rows(teacher: Vocabulary, student: Vocabulary) -> int:
    """Return how many leading rows both heads share: the real tokens.

    Raises:
        MismatchError: The numbers of real tokens differ, or a head has fewer rows than real tokens.
    """
    for side, vocabulary in (("teacher", teacher), ("student", student)):
        if vocabulary.rows < vocabulary.size:
            raise MismatchError(
                f"the {side}'s head has {vocabulary.rows} rows for {vocabulary.size} real tokens; "
                f"use a {side} whose head covers its tokenizer (resize its embeddings, then save it)"
            )
    if teacher.size != student.size:
        raise MismatchError(
            f"the teacher's vocabulary has {teacher.size} real tokens, the student's {student.size}; "
            f"use a student of the teacher's tokenizer, or dump again with a teacher of the student's"
        )
    return teacher.size


def check_ids(token_ids: NDArray[np.integer], size: int, *, where: str) -> None:
    """Refuse token ids that are not real tokens.

    Args:
        token_ids: Ids of any shape.
        size: Real tokens.
        where: What holds the ids, for the message.

    Raises:
        MismatchError: An id is negative, or `size` or more.
    """
    if not token_ids.size:
        return
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= size:
        raise MismatchError(
            f"{where} holds token id {low if low < 0 else high}, but the vocabulary has ids 0 to {size - 1}; "
            f"the cache belongs to another tokenizer or is damaged: run `cascache verify`"
        )
