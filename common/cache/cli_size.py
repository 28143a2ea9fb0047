"""`cascache estimate`: bytes and time of a level from counts, before it is dumped."""

import argparse
from typing import Any

from common.cache.commands import Answer, add_command

_TEXT = "bytes by term, and time, of a level from counts; `teacher-dump --dry-run` counts your own data"
_IMAGE_POSITIONS = (
    "positions per image; default: 640 x 480 pixels under LLaVA-OneVision (up to 384 x 384: 1485; from "
    "1280 x 960: about 7300; LLaVA-1.5: always 576; Qwen-VL: pixels / 784 or / 1024, at most 1280)"
)


def add_commands(subparsers: Any) -> None:
    """Register the group."""
    command = add_command(subparsers, "estimate", _TEXT, run_estimate, render=render_estimate)
    counts = command.add_argument_group("the data, as the teacher sees it")
    counts.add_argument("--samples", type=int, required=True, metavar="N", help="samples")
    counts.add_argument("--images", type=int, metavar="N", help="distinct images; default: one per sample")
    counts.add_argument("--image-positions", type=int, default=2929, metavar="N", help=_IMAGE_POSITIONS)
    counts.add_argument("--response", type=float, default=90, metavar="N", help="response tokens per sample")
    counts.add_argument("--prompt", type=float, default=60, metavar="N", help="other text tokens per sample")
    kept = command.add_argument_group("what is kept, as for teacher-dump")
    kept.add_argument("--topk", type=int, default=64, metavar="K", help="ids per response row")
    kept.add_argument("--visual-topk", type=int, metavar="K", help="ids per image row; default: --topk")
    kept.add_argument("--visual-fraction", type=float, default=1.0, metavar="X", help="share of image rows")
    kept.add_argument("--relation-store", default="factor", choices=("factor", "hidden", "both", "none"))
    kept.add_argument("--hidden-encoding", default="bfloat16", choices=("bfloat16", "float32", "int8"))
    kept.add_argument("--width", type=int, default=3584, metavar="D", help="width of raw hidden states")
    kept.add_argument("--profile", default="pcodec", choices=("pcodec", "portable"))
    command.add_argument(
        "--rate", type=float, metavar="X", help="positions per second of one engine, if known"
    )
    command.add_argument("--engines", type=int, default=1, metavar="N", help="engines side by side")


def run_estimate(arguments: argparse.Namespace) -> tuple[int, Answer]:
    """Counts in, bytes out."""
    from common.cache.size import Kept, LevelShape, size_bytes

    images = arguments.samples if arguments.images is None else arguments.images
    seen = min(images, arguments.samples)
    # Questions on one image compute it once: their other positions are text.
    computed = arguments.samples * (arguments.prompt + arguments.response) + seen * arguments.image_positions
    positions = arguments.prompt + arguments.response + arguments.image_positions * (images > 0)
    shape = LevelShape(arguments.samples, positions, arguments.response, images, arguments.image_positions)
    kept = Kept(
        topk=arguments.topk,
        visual_topk=arguments.topk if arguments.visual_topk is None else arguments.visual_topk,
        visual_fraction=arguments.visual_fraction,
        relation_store=arguments.relation_store,
        hidden_size=arguments.width,
        hidden_encoding=arguments.hidden_encoding,
        profile=arguments.profile,
    )
    terms = size_bytes(shape, kept)
    seconds = round(computed / (arguments.rate * arguments.engines), 1) if arguments.rate else None
    return 0, {
        "samples": arguments.samples,
        "images": images,
        "positions_computed": round(computed),
        "bytes": sum(terms.values()),
        "bytes_by_term": terms,
        "seconds": seconds,
    }


def render_estimate(answer: Answer) -> str:
    """Gigabytes by term, and hours."""
    lines = [f"{answer['samples']:,} samples, {answer['positions_computed']:,} positions computed"]
    lines += [f"  {name:10}{size / 1e9:10.2f} GB" for name, size in answer["bytes_by_term"].items()]
    lines.append(f"  {'together':10}{answer['bytes'] / 1e9:10.2f} GB, within a factor of two")
    if answer["seconds"] is not None:
        lines.append(f"  {answer['seconds'] / 3600:.1f} hours at that rate")
    return "\n".join(lines)
