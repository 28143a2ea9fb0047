import numpy as np
import pytest

from common.errors import MismatchError
from common.vocab import Vocabulary, check_ids, shared_rows


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ((152_064, 151_665), (151_936, 151_665)),
        ((151_936, 151_665), (152_064, 151_665)),
        ((448, 448), (448, 448)),
    ],
)
def test_heads_padded_differently_share_the_real_rows(teacher, student) -> None:
    assert shared_rows(Vocabulary(*teacher), Vocabulary(*student)) == teacher[1]


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ((100, 90), (100, 91), "teacher's vocabulary has 90 real tokens, the student's 91"),
        ((100, 90), (80, 90), "student's head has 80 rows for 90 real tokens"),
        ((80, 90), (100, 90), "teacher's head has 80 rows for 90 real tokens"),
    ],
)
def test_what_does_not_fit_is_refused(teacher, student, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        shared_rows(Vocabulary(*teacher), Vocabulary(*student))


@pytest.mark.parametrize("ids", [[], [0, 89], [[5, 7], [0, 0]]])
def test_real_ids_pass(ids) -> None:
    check_ids(np.array(ids, dtype=np.int32), 90, where="part 3")


@pytest.mark.parametrize(("ids", "named"), [([0, 90], "90"), ([-1, 5], "-1")])
def test_other_ids_are_refused(ids, named: str) -> None:
    with pytest.raises(MismatchError, match=f"part 3 holds token id {named}, .* ids 0 to 89"):
        check_ids(np.array(ids), 90, where="part 3")
