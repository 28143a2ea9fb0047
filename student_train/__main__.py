"""`python -m student_train`: the `student-train` command, for launchers such as torchrun."""

import sys

from student_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
