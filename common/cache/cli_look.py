"""`cascache diff · show · report`: caches side by side, one sample, one page."""

import argparse
import os
import sys
from typing import Any

from common.cache.commands import Answer, add_command, to_text
from common.cache.terminal import heat_map, plain

_SHOWN_PROMPT = 600


def add_commands(subparsers: Any) -> None:
    """Register the group."""
    path = "directory or URL of the cache"
    diff = add_command(
        subparsers, "diff", "how two caches differ; exit code 1 when they do", run_diff, render=render_diff
    )
    diff.add_argument("first", help=path)
    diff.add_argument("second", help=path)
    diff.add_argument("--samples", type=int, default=32, help="samples whose values are compared (32)")
    show = add_command(subparsers, "show", "one sample as the teacher saw it", run_show, render=render_show)
    show.add_argument("path", help=path)
    show.add_argument("sample_id", help="which sample")
    show.add_argument("--tokenizer", metavar="MODEL", help="model with the cache's tokenizer, for texts")
    show.add_argument("--data", help="samples to look for the image in")
    report = add_command(subparsers, "report", "one self-contained HTML page about caches", run_report)
    report.add_argument("paths", nargs="+", metavar="path", help=path)
    report.add_argument("--out", default="report.html", help="file to write (report.html)")
    report.add_argument("--samples", type=int, default=256, help="samples the distributions are of (256)")
    report.add_argument("--gallery", type=int, default=6, help="samples shown (6)")
    report.add_argument("--tokenizer", metavar="MODEL", help="model with the caches' tokenizer, for texts")


def run_diff(arguments: argparse.Namespace) -> tuple[int, Answer]:
    """Identity and values; 1 when something differs."""
    from common.cache.differ import compare
    from common.cache.reader import CacheReader

    with CacheReader(arguments.first) as first, CacheReader(arguments.second) as second:
        answer = compare(first, second, num_samples=max(1, arguments.samples))
    return int(not answer["same"]), {"first": arguments.first, "second": arguments.second} | answer


def render_diff(answer: Answer) -> str:
    """Fields that differ, one a line, then the numbers."""
    lines = answer["identity"] or ["identity: the same in every field"]
    rest = {name: value for name, value in answer.items() if name != "identity"}
    return "\n".join([*(plain(line) for line in lines), "", to_text(rest)])


def run_show(arguments: argparse.Namespace) -> tuple[int, Answer]:
    """One record, with texts and the picture where they can be had."""
    from common.cache.look import describe_record, find_decoder, find_picture, find_record
    from common.cache.reader import CacheReader

    with CacheReader(arguments.path) as cache:
        index = find_record(cache, arguments.sample_id)
        decode = find_decoder(cache.manifest, arguments.tokenizer)
        answer = {"path": arguments.path} | describe_record(
            cache.read_record(index), decode, has_text=not cache.manifest.without_text
        )
        for number, image in enumerate(answer["images"]):
            encoded = find_picture(cache, index, number, data=arguments.data)
            image["picture_found"] = encoded is not None
            if encoded is not None and not arguments.json and _has_colours():
                image["picture"] = _draw(encoded)
    return 0, answer


def _has_colours() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _draw(encoded: bytes) -> list[str]:
    from common.cache.terminal import half_blocks
    from common.images import decode_image

    return half_blocks(decode_image(encoded, where="the image"))


def render_show(answer: Answer) -> str:
    """The picture, its heat map, the prompt, and a line a response token."""
    lines = [f"{plain(answer['sample_id'])} ({plain(str(answer['kind']))}), {answer['num_tokens']} tokens"]
    for number, image in enumerate(answer["images"]):
        lines += ["", *image.get("picture", [])]
        lines += _render_heat(number, image)
    ids = "not in this cache" if answer["prompt_ids"] is None else f"ids {answer['prompt_ids']}"
    prompt = ids if answer["prompt"] is None else answer["prompt"]
    lines += ["", f"prompt    {plain(prompt[:_SHOWN_PROMPT])}", "", "response  p     teacher"]
    for row in answer["response"]:
        share = "   - " if row["probability"] is None else f"{row['probability']:5.2f}"
        tops = "  ".join(f"{_word(each)} {each['probability']:.2f}" for each in row["teacher"])
        lines.append(f"{_word(row):<9} {share} {tops}")
    return "\n".join(lines)


def _render_heat(number: int, image: dict[str, Any]) -> list[str]:
    cells = [value for grid in image["entropy_nats"] for line in grid for value in line if value is not None]
    rank = "" if image["relation_rank"] is None else f", relation of rank {image['relation_rank']}"
    head = f"image {number}: {image['num_positions']} positions{rank}"
    if not cells:
        return [f"{head}, no rows kept"]
    low, high = min(cells), max(cells)
    lines = [f"{head}; entropy from {low:.2f} (blank) to {high:.2f} nats (full)"]
    for grid in image["entropy_nats"]:
        lines += [f"  {line}" for line in heat_map(grid, low=low, high=high)]
    return lines


def _word(token: dict[str, Any]) -> str:
    if token["id"] is None:
        return "·"
    return f"#{token['id']}" if token["text"] is None else plain(repr(token["text"])[1:-1]) or "''"


def run_report(arguments: argparse.Namespace) -> tuple[int, Answer]:
    """Write the page."""
    from common.cache.report import write_report

    num_bytes = write_report(
        arguments.paths,
        arguments.out,
        num_samples=max(1, arguments.samples),
        num_shown=max(0, arguments.gallery),
        tokenizer=arguments.tokenizer,
    )
    return 0, {"report": arguments.out, "caches": list(arguments.paths), "bytes": num_bytes}
