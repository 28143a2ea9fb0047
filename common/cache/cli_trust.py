"""`cascache sign · check`: whose cache this is, and whether a student fits it."""

import argparse
from pathlib import Path
from typing import Any

from common.cache.commands import Answer, add_command


def add_commands(subparsers: Any) -> None:
    """Register the group."""
    path = "directory or URL of the cache"
    sign = add_command(subparsers, "sign", "verify a cache, then sign its root hash (Ed25519)", run_sign)
    sign.add_argument("path", help=path)
    sign.add_argument("--key", required=True, help="private key (PEM, no password)")
    sign.add_argument("--signature", help="file to write; default: the path with .sig behind it")
    check = add_command(
        subparsers, "check", "whether a student can train from a cache", run_check, render=render_check
    )
    check.add_argument("path", help=path)
    check.add_argument("--student", required=True, help="preset, model directory or hub id")
    check.add_argument("--chat-template", help="file with the chat template of dump and training")
    for name, which in (("--max-pixels", "largest"), ("--min-pixels", "smallest")):
        check.add_argument(name, metavar="N", help=f"{which} area of an image, as for student-train")
    check.add_argument(
        "--image-grid",
        choices=("teacher", "own"),
        default="teacher",
        help="as for student-train: own, the student may see images through another processor",
    )


def run_sign(arguments: argparse.Namespace) -> tuple[int, Answer]:
    """Sign what is whole, and nothing else; 1 when it is not."""
    from common.cache.trust import root_hash, sign_root, signature_path
    from common.cache.verify import verify

    target = Path(arguments.signature) if arguments.signature else signature_path(arguments.path)
    root = root_hash(arguments.path)
    document = sign_root(root, Path(arguments.key))
    report = verify(arguments.path)
    if not report.ok:
        problems = [f"{problem.path}: {problem.message}" for problem in report.problems[:6]]
        return 1, {"path": arguments.path, "signed": False, "problems": problems}
    target.write_text(document, "utf-8")
    return 0, {"path": arguments.path, "root": root, "signed": True, "signature": str(target)}


def run_check(arguments: argparse.Namespace) -> tuple[int, Answer]:
    """Every field compared; 1 when one does not fit."""
    from common.cache.seals import read_manifest
    from common.compat import check_fit
    from common.models import resolve_model
    from common.processor import load_processor, read_options, read_vocab_rows

    manifest = read_manifest(arguments.path)
    own_grid = arguments.image_grid == "own"
    student = resolve_model(arguments.student)
    fit = check_fit(
        manifest,
        load_processor(
            student.path_or_id,
            revision=student.revision,
            options=read_options(arguments),
            level=None if own_grid else manifest,
        ),
        vocab_rows=read_vocab_rows(student.path_or_id, revision=student.revision),
        own_grid=own_grid,
    )
    fields = [
        {"field": each.name, "verdict": each.verdict, "cache": each.cache, "student": each.student}
        | {"note": each.note}
        for each in fit.fields
    ]
    answer = {
        "path": arguments.path,
        "student": student.name,
        "teacher": manifest.teacher.model,
        "fits": not fit.problems,
        "fields": fields,
    }
    return int(bool(fit.problems)), answer


def render_check(answer: Answer) -> str:
    """One line a field, what to do below it, the answer at the end."""
    lines = []
    for each in answer["fields"]:
        sides = (
            "" if each["cache"] == each["student"] else f"  cache {each['cache']}, student {each['student']}"
        )
        lines.append(f"{each['field']:<20} {each['verdict']:<17}{sides}".rstrip())
        lines += [f"{'':<21}{each['note']}"] if each["note"] else []
    word = "fits" if answer["fits"] else "does not fit"
    return "\n".join(
        [*lines, "", f"student {answer['student']} {word} {answer['path']} (teacher {answer['teacher']})"]
    )
