"""`cascache doctor`: can this machine dump and train, and how fast?

exit code   0 every check passes, warns or was skipped · 1 some check fails · 2 the settings are wrong
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from common.doctor.check import Check
from common.doctor.config import DoctorConfig
from common.errors import CascacheError, tell_os_error
from common.settings import load_settings

NAME = "doctor"
TEXT = "check whether this machine can dump and train, and measure both on a few samples"
_EPILOG = """examples:
  cascache doctor                                      the shipped models on the built-in images
  cascache doctor --model 7b --data train.json         the dump that you are planning
  cascache doctor --model 7b --data train.json --quick no model is loaded
  cascache doctor ... --json > doctor.json             for a bug report
exit codes: 0 every check passes, warns or was skipped; 1 some check fails; 2 the settings are wrong
what each line means, and what to do about it: docs/gpu.md"""

EXIT_FAILED, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130


def add_commands(subparsers: Any) -> None:
    """List the command in `cascache --help`; `main` reads its flags."""
    subparsers.add_parser(NAME, help=TEXT, description=TEXT, add_help=False)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status.

    Args:
        argv: What follows `cascache doctor`.
    """
    try:
        config = load_settings(
            DoctorConfig, argv, prog="cascache doctor", section="cascache-doctor", epilog=_EPILOG
        )
        return _run(config)
    except CascacheError as error:
        _say(f"error: {error}")
        return EXIT_ERROR
    except OSError as error:
        _say(f"error: {tell_os_error(error)}")
        return EXIT_ERROR
    except KeyboardInterrupt:
        _say("interrupted; temporary files are removed")
        return EXIT_INTERRUPTED


def _run(config: DoctorConfig) -> int:
    from common.doctor.examine import dump_command, examine
    from common.doctor.table import on_terminal, render_check, render_end

    colour, checks = on_terminal(), []

    def show(check: Check) -> None:
        checks.append(check)
        line = render_check(check, colour=colour)
        print(line, file=sys.stderr if config.json_ else sys.stdout, flush=True)

    document = examine(config, say=_say, show=show)
    if config.json_:
        print(json.dumps(document, indent=1))
    else:
        print(render_end(checks, document["seconds"], dump_command(config)))
    return EXIT_FAILED if document["summary"]["fail"] else 0


def _say(line: str) -> None:
    print(f"cascache doctor: {line}", file=sys.stderr, flush=True)
