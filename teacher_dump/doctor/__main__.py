"""`python -m teacher_dump.doctor`: the teacher's half of `cascache doctor`, with its flags.

    samples of the data ──prepare──> engine ──> records ──> sealed part      each timed by itself
                                        │           └─────> compared with transformers
                                        └─ the same samples again, nothing kept

The engine starts as a dump starts it and is gone before transformers loads the same weights. The small
cache stays in `--keep` for the student's half.
"""

import os
import sys
from collections.abc import Sequence

from common.doctor.check import CHECKS
from common.doctor.reporter import run_part


def main(argv: Sequence[str] | None = None) -> int:
    """Run the half; returns its exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # before torch: keep CUDA uninitialised
    from teacher_dump.doctor.half import check_teacher

    arguments = sys.argv[1:] if argv is None else argv
    return run_part(CHECKS["teacher"], check_teacher, arguments, prog="python -m teacher_dump.doctor")


if __name__ == "__main__":
    raise SystemExit(main())
