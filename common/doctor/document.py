"""What `cascache doctor --json` prints: everything that a bug report needs, without private data.

schema       cascache-doctor/1; the number increases when a field changes its meaning
versions     distribution -> release, cascache's own among them
machine      python, platform, cores, memory
environment  variables that matter; secrets as "(set)"
arguments    every setting of the command
checks       name, status, found, wanted, cure, values, seconds
summary      checks by status
seconds      the whole run
"""

import os
import platform
import sys
from typing import Any, Final

from common.devices import free_memory
from common.doctor.check import CHECKS, Check
from common.doctor.config import DoctorConfig
from common.doctor.redact import redact_all
from common.doctor.table import count
from common.models import ModelRef

SCHEMA: Final = "cascache-doctor/1"


def to_document(
    config: DoctorConfig, teacher: ModelRef, student: ModelRef | None, checks: list[Check], seconds: float
) -> dict[str, Any]:
    """The document, redacted."""
    by_name = {check.name: check for check in checks}
    part = {name: part for part, names in CHECKS.items() for name in names}
    return {
        "schema": SCHEMA,
        "versions": by_name["versions"].values.get("versions", {}) if "versions" in by_name else {},
        "machine": {
            "python": platform.python_version(),
            "implementation": sys.implementation.name,
            "platform": redact_all(platform.platform()),
            "architecture": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "free_memory_bytes": free_memory(),
        },
        "environment": by_name["environment"].values.get("variables", {}) if "environment" in by_name else {},
        "arguments": redact_all(config.model_dump(mode="json", by_alias=False)),
        "models": redact_all(
            {"teacher": teacher.path_or_id, "student": student.path_or_id if student else None}
        ),
        "checks": [{"part": part[check.name], **check.to_json()} for check in checks],
        "summary": count(checks),
        "seconds": round(seconds, 1),
    }
