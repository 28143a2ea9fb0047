"""`python -m teacher_dump` is `teacher-dump`."""

from teacher_dump.cli import main

raise SystemExit(main())
