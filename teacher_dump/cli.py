"""The command `teacher-dump`: read the settings, hand over, say what came of it."""

import json
import shlex
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

from common.console import escape_unprintable
from common.errors import CascacheError, tell_os_error
from common.extras import tell_missing_module
from common.processor import ProcessorOptions
from common.settings import load_settings
from teacher_dump.config import AuditConfig, DumpConfig
from teacher_dump.environment import prepare_environment

_EPILOG = """examples:
  teacher-dump --model tiny                             the shipped teacher on the built-in images
  teacher-dump --model 7b --topk 64 --data train.json   a level from your data
  teacher-dump --model 7b --data train.json --dry-run   what it would cost
  teacher-dump ... --dry-run --sample-estimate 64       the same, measured on 64 samples
  teacher-dump verify ./zarr/l1 --sample 32             compute samples again and compare
A run that was stopped resumes when the same command is given again."""

EXIT_DIFFERS = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    escape_unprintable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    prepare_environment()
    try:
        if arguments[:1] == ["verify"]:
            return _verify(arguments[1:])
        config = load_settings(DumpConfig, arguments, prog="teacher-dump", epilog=_EPILOG)
        if config.status:
            return _status(config)
        from teacher_dump.dump import dump

        result = dump(config, _say)
    except CascacheError as error:
        _say(f"error: {error}")
        return EXIT_ERROR
    except OSError as error:
        _say(f"error: {tell_os_error(error)}")
        return EXIT_ERROR
    except ModuleNotFoundError as error:
        line = tell_missing_module(error, teacher=True)
        if line is None:
            raise
        _say(f"error: {line}")
        return EXIT_ERROR
    except KeyboardInterrupt:
        _say("stopped; sealed parts are kept, nothing is half written; run the same command again to resume")
        return EXIT_INTERRUPTED
    print(json.dumps(result) if config.json_ else _sentence(result, config))
    return 0


def _status(config: DumpConfig) -> int:
    from teacher_dump.status import status

    found = status("zarr/l1" if config.out == "auto" else config.out)
    if config.json_:
        print(json.dumps(found))
    else:
        print(
            f"{found['cache']} ({found['teacher']}): {found['sealed_parts']} of {found['parts']} parts, "
            f"{found['samples_done']:,} of {found['samples']:,} samples, {found['quarantined']} quarantined, "
            f"{found['rows']:,} rows, {found['size_bytes'] / 1e6:,.1f} MB"
        )
    return 0


def _verify(arguments: list[str]) -> int:
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--cache", *arguments]
    config = load_settings(AuditConfig, arguments, prog="teacher-dump verify")
    from teacher_dump.audit import audit

    found = audit(config, _say)
    if config.json_:
        print(json.dumps(found))
    else:
        for kind in ("response", "visual"):
            if kind in found:
                print(f"{kind}: " + ", ".join(f"{name} {value:.3g}" for name, value in found[kind].items()))
        print(f"relation: max_factor_error {found['max_factor_error']:.3g}")
        verdict = "cache matches its teacher" if found["ok"] else "cache does NOT match its teacher"
        print(f"{verdict} (mean KL at most {found['max_kl']:.2g} nats, computed in {found['dtype']})")
    return 0 if found["ok"] else EXIT_DIFFERS


def _say(line: str) -> None:
    print(f"teacher-dump: {line}", file=sys.stderr, flush=True)


def _sentence(result: dict[str, Any], config: DumpConfig) -> str:
    if "size_bytes" not in result:
        lost = f", reasons in {result['quarantine']}" if result["quarantined"] else ""
        return (
            f"{result['cache']}: {result['parts']} parts ({result['dumped']} dumped now), "
            f"{result['quarantined']} samples quarantined{lost}\n"
            f"next: {_next_command(result['cache'], config)}"
        )
    seconds, free = result["seconds"], result["disk_free_bytes"]
    time = "unknown" if seconds is None else f"about {seconds:,.0f} s"
    room = "" if free is None else f" ({free / 1e9:,.1f} GB free)"
    lines = [
        f"plan: {result['teacher']} ({result['dtype']}) on {result['data']} → {result['out']}",
        f"  {result['samples']:,} samples with {result['images']:,} images in {result['parts']} parts "
        f"of {result['part_samples']}: {result['positions']:,} positions",
        f"  size about {result['size_bytes'] / 1e6:,.1f} MB{room}, time {time}",
        f"  {_bad_samples(result['bad_samples'])}",
    ]
    if not result["weights"]:
        lines.append(f"note: {result['directory']} has no weights (*.safetensors, *.bin); a dump needs them")
    if result["image_positions"]:
        lines.insert(2, f"  {_image_positions(result['image_positions'], result['max_len'])}")
    if "trial" in result:
        lines += [f"  {_trial(result['trial'])}"]
    return "\n".join(lines)


def _next_command(cache: str, config: DumpConfig) -> str:
    """The training of this level, with the processor set as it was here."""
    given = {name: getattr(config, name) for name in ProcessorOptions.model_fields}
    options = {
        f"--{name.replace('_', '-')}": str(value) for name, value in given.items() if value is not None
    }
    return shlex.join(["student-train", "--cache", cache, *chain.from_iterable(options.items())])


def _image_positions(found: dict[str, Any], max_len: int) -> str:
    over = f", more than --max-len {max_len:,} holds" if found["largest"] >= max_len else ""
    return (
        f"positions per image: {found['mean']:,.0f} on average, {found['largest']:,} at most{over} "
        f"(from the sizes of {found['images']:,} images)"
    )


def _bad_samples(found: dict[str, Any]) -> str:
    reasons = found["by_reason"]
    looked = f"{found['rendered']:,} of them under the chat template; images were not decoded"
    if not reasons:
        return f"no bad sample among {found['checked']:,} ({looked})"
    counted = ", ".join(f"{count} × {reason}" for reason, count in reasons.items())
    return (
        f"{sum(reasons.values())} bad samples among {found['checked']:,} ({looked}): "
        f"{counted}; the first: {found['first']}"
        + ("\n  that is more than --max-quarantine allows: the dump would stop" if found["stops"] else "")
    )


def _trial(found: dict[str, Any]) -> str:
    size, low, high = (each / 1e6 for each in found["size_bytes"])
    seconds, bad = found["seconds"], [100 * each for each in found["quarantine_share"]]
    return (
        f"from {found['samples']} samples, really dumped: {size:,.1f} MB ({low:,.1f} to {high:,.1f}), "
        f"{seconds[0]:,.0f} s on one engine ({seconds[1]:,.0f} to {seconds[2]:,.0f}) after "
        f"{found['start_seconds']:,.0f} s to start, {bad[0]:.1f} % unusable ({bad[1]:.1f} to {bad[2]:.1f})"
    )


if __name__ == "__main__":
    raise SystemExit(main())
