"""`python -m student_train.doctor`: the student's half of `cascache doctor`, with its flags.

    small cache ──plan──> fit ──one batch──> fused against eager losses ──steps──> speed, memory

The cache is `--cache`, else what the teacher's half left in `--keep`, else one with made-up targets on the
data's real prompts: enough for speed, memory and agreement, while its losses mean nothing.
"""

import sys
from collections.abc import Sequence

from common.doctor.check import CHECKS
from common.doctor.reporter import run_part


def main(argv: Sequence[str] | None = None) -> int:
    """Run the half; returns its exit status."""
    from student_train.doctor.half import check_student

    arguments = sys.argv[1:] if argv is None else argv
    return run_part(CHECKS["student"], check_student, arguments, prog="python -m student_train.doctor")


if __name__ == "__main__":
    raise SystemExit(main())
