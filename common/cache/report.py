"""What is in caches, as one self-contained HTML page: levels side by side.

seals   ──> identity, bytes by array, codec errors, quarantine          exact
records ──> kept mass, entropy, relation ranks, a gallery of heat maps   of samples spread evenly
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.cache.charts import Histogram, heat_cells, histogram
from common.cache.look import Decode, describe_record, entropy_nats, find_decoder, find_picture, kept_mass
from common.cache.reader import CacheReader
from common.cache.trust import root_hash
from common.errors import ConfigError, DataError
from common.html import image_uri, render_page
from common.images import decode_image
from common.record import Record, TopK

MAX_LEVELS: Final = 6
"""Caches on one page."""

SMALLEST_TAIL: Final = 1e-7
"""Where the axis of the mass outside begins: what float32 can tell from nothing."""

GROUPS: Final = {
    "response": "rows at response positions",
    "visual": "rows at image positions",
    "image_factor": "relation factors",
    "image_hidden": "hidden states of images",
    "image_files": "encoded image files",
    "sample": "token ids, spans, sample ids",
    "image": "tables of images",
}
"""Prefix of an array's name → what it is for people; the longest prefix counts."""

_PICTURE_PIXELS: Final = 240
_SHOWN_WORDS: Final = 60


@dataclass(slots=True)
class Table:
    """Numbers of all sampled rows of one table."""

    entropy: list[NDArray[np.float64]] = field(default_factory=list)
    """Entropies in nats, a piece a record."""
    mass: list[NDArray[np.float64]] = field(default_factory=list)
    """Kept masses."""

    def add(self, rows: TopK) -> None:
        """Take a record's rows in."""
        self.entropy.append(entropy_nats(rows))
        self.mass.append(kept_mass(rows))

    def joined(self, name: str) -> NDArray[np.float64]:
        """All values of `entropy` or `mass`."""
        return np.concatenate([np.empty(0), *getattr(self, name)])


@dataclass(slots=True)
class Measured:
    """What sampled records of one cache say."""

    response: Table = field(default_factory=Table)
    """Rows at response positions."""
    visual: Table = field(default_factory=Table)
    """Rows at image positions."""
    ranks: list[int] = field(default_factory=list)
    """Rank of each image's relation factor."""
    errors: list[float] = field(default_factory=list)
    """Its achieved error."""


def write_report(
    paths: Sequence[str], out: str, *, num_samples: int, num_shown: int, tokenizer: str | None = None
) -> int:
    """Write the page; returns its bytes.

    Args:
        paths: Caches, nearest teacher first.
        out: The file.
        num_samples: Records that the distributions are taken from.
        num_shown: Records in the gallery.
        tokenizer: Model with the caches' tokenizer; else the teacher, if that is a shipped preset.

    Raises:
        ConfigError: Too many caches, or the file cannot be written.
        CacheError: A cache is missing or damaged.
    """
    if len(paths) > MAX_LEVELS:
        raise ConfigError(f"{len(paths)} caches on one page, at most {MAX_LEVELS}; write several pages")
    with ExitStack() as stack:
        caches = [stack.enter_context(CacheReader(path)) for path in paths]
        page = render_page("report.html.j2", **describe(paths, caches, num_samples, num_shown, tokenizer))
    try:
        Path(out).write_text(page, "utf-8")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error}); name another file with --out") from error
    return len(page.encode())


def describe(
    paths: Sequence[str],
    caches: Sequence[CacheReader],
    num_samples: int,
    num_shown: int,
    tokenizer: str | None,
) -> dict[str, Any]:
    """Everything the page shows, as values for its template."""
    names = [Path(path.rstrip("/")).name or path for path in paths]
    if len(set(names)) < len(names):
        names = list(paths)
    measured = [measure(cache, num_samples) for cache in caches]
    decoders = [find_decoder(cache.manifest, tokenizer) for cache in caches]
    return {
        "title": f"cascache: {', '.join(names)}",
        "levels": names,
        "identity": _identity(caches),
        "sizes": [_sizes(cache) for cache in caches],
        "charts": _charts(measured),
        "masses": _masses(names, measured),
        "relations": [_relation(cache, each) for cache, each in zip(caches, measured, strict=True)],
        "errors": [_errors(cache) for cache in caches],
        "quarantine": [_quarantine(cache) for cache in caches],
        "gallery": _gallery(names, caches, decoders, num_shown),
        "num_samples": [min(num_samples, cache.num_samples) for cache in caches],
    }


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` indices, evenly spread, each once."""
    chosen: list[int] = np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)).tolist()
    return chosen


def measure(cache: CacheReader, num_samples: int) -> Measured:
    """Numbers of sampled records; an image counts once for each of them."""
    found = Measured()
    for index in spread(cache.num_samples, num_samples):
        record = cache.read_record(index)
        found.response.add(record.response)
        for image in record.visual:
            if image.topk is not None:
                found.visual.add(image.topk)
            if image.factor is not None:
                found.ranks.append(int(image.factor.shape[1]))
                found.errors.append(image.factor_error)
    return found


def _identity(caches: Sequence[CacheReader]) -> list[dict[str, Any]]:
    """Rows of the table: a name, a value a level, whether the levels differ."""
    columns = [_identity_of(cache) for cache in caches]
    return [
        {"name": name, "values": values, "differs": len(set(values)) > 1}
        for name in columns[0]
        for values in [[column[name] for column in columns]]
    ]


def _identity_of(cache: CacheReader) -> dict[str, str]:
    m, seals = cache.manifest, cache.seals.values()
    num_bytes = sum(file.size_bytes for seal in seals for file in seal.files.values())
    rows = sum(seal.num_response_rows + seal.num_visual_rows for seal in seals)
    step = f", steps of {m.encoding.logit_step:g} nat" if m.encoding.logits == "steps" else ""
    return {
        "teacher": m.teacher.model + (f" @ {m.teacher.revision[:10]}" if m.teacher.revision else ""),
        "weights": m.teacher.weights_sha256[:10],
        "computed in": m.teacher.dtype + (f", {m.teacher.quantization}" if m.teacher.quantization else ""),
        "samples": f"{cache.num_samples:,} of {m.samples.num_samples:,}",
        "parts": f"{len(cache.seals)} of {m.num_parts}",
        "images": f"{sum(seal.num_images for seal in seals):,}",
        "positions": f"{rows:,}",
        "size": f"{num_bytes / 1e6:,.2f} MB",
        "bytes a position": f"{num_bytes / rows:,.1f}" if rows else "–",
        "kept ids": f"{m.capture.topk} response, {m.capture.visual_topk} image ({m.capture.sampling})",
        "positions kept": m.capture.positions,
        "responses": m.capture.responses,
        "temperatures": ", ".join(f"{each:g}" for each in m.capture.temperatures),
        "relation": f"{m.relation.store} of {m.relation.of}",
        "encoding": f"{m.encoding.profile}, {m.encoding.logits}{step}",
        "tokenizer": m.fingerprints.tokenizer[:10],
        "chat template": m.fingerprints.chat_template[:10],
        "image processor": m.fingerprints.image_processor[:10],
        "data": m.samples.fingerprint[:10],
        "root": root_hash(cache.store)[:17],
    }


def _sizes(cache: CacheReader) -> list[dict[str, Any]]:
    """Bytes by group, largest first, with the arrays inside."""
    sizes = Counter[str]()
    for seal in cache.seals.values():
        for name, file in seal.files.items():
            sizes[name.split("/")[0] if "/" in name else "metadata"] += file.size_bytes
    groups: dict[str, Counter[str]] = {}
    for name, size in sizes.items():
        prefix = max((p for p in GROUPS if name.startswith(p)), key=len, default="metadata")
        groups.setdefault(GROUPS.get(prefix, "metadata"), Counter())[name] = size
    total = max(1, sum(sizes.values()))
    rows = [
        {
            "name": name,
            "size": f"{sum(held.values()) / 1e3:,.1f} kB",
            "share": sum(held.values()) / total,
            "arrays": ", ".join(f"{array} {100 * size / total:.0f} %" for array, size in held.most_common(4)),
        }
        for name, held in groups.items()
    ]
    return sorted(rows, key=lambda row: -float(row["share"]))


def _charts(measured: Sequence[Measured]) -> list[tuple[str, Histogram]]:
    charts = []
    for name in ("response", "visual"):
        where = "image" if name == "visual" else name
        tables = [getattr(each, name) for each in measured]
        entropies = [table.joined("entropy") for table in tables]
        tails = [np.log10(np.maximum(1 - table.joined("mass"), SMALLEST_TAIL)) for table in tables]
        if not any(len(values) for values in entropies):
            continue
        charts.append((f"Entropy at {where} positions, nats", histogram(entropies, low=0.0)))
        title = f"Mass outside the kept ids at {where} positions"
        charts.append((title, histogram(tails, low=np.log10(SMALLEST_TAIL), high=0.0, powers=True)))
    ranks = [np.array(each.ranks, float) for each in measured]
    if any(len(values) for values in ranks):
        charts.append(("Rank of the relation factors", histogram(ranks, low=0.0, whole=True)))
    return charts


def _masses(names: Sequence[str], measured: Sequence[Measured]) -> list[dict[str, Any]]:
    rows = []
    for name, each in zip(names, measured, strict=True):
        for where, table in (("response", each.response), ("image", each.visual)):
            mass, entropy = table.joined("mass"), table.joined("entropy")
            if len(mass):
                low, middle = np.percentile(mass, [5, 50])
                rows.append(
                    {"level": name, "where": where, "rows": f"{len(mass):,}", "mean": f"{mass.mean():.4f}"}
                    | {"low": f"{low:.4f}", "middle": f"{middle:.4f}", "entropy": f"{entropy.mean():.2f}"}
                )
    return rows


def _relation(cache: CacheReader, found: Measured) -> dict[str, str] | None:
    if not found.ranks:
        return None
    return {
        "images": f"{len(found.ranks):,}",
        "rank": f"{np.median(found.ranks):.0f} (at most {max(found.ranks)})",
        "error": f"{max(found.errors):.2g}",
        "median": f"{np.median(found.errors):.2g}",
        "tolerance": f"{cache.manifest.relation.tolerance:.2g}",
    }


def _errors(cache: CacheReader) -> list[dict[str, str]]:
    """The worst over all parts, as the writers measured it."""
    worst: dict[str, float] = {}
    for seal in cache.seals.values():
        for name, value in seal.errors.items():
            worst[name] = max(worst.get(name, 0.0), value)
    return [
        {"name": name.replace("_", " "), "value": f"{value:.3g}"} for name, value in sorted(worst.items())
    ]


def _quarantine(cache: CacheReader) -> list[dict[str, Any]]:
    reasons: dict[str, list[str]] = {}
    for seal in cache.seals.values():
        for each in seal.quarantined:
            reasons.setdefault(each.reason, []).append(each.sample_id)
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    return [{"reason": reason, "count": len(ids), "such_as": ", ".join(ids[:3])} for reason, ids in ordered]


def _gallery(
    names: Sequence[str], caches: Sequence[CacheReader], decoders: Sequence[Decode | None], num_shown: int
) -> list[dict[str, Any]]:
    """Samples that all levels hold: the picture, and a heat map and the response for each level."""
    others = [set(cache.sample_ids) for cache in caches[1:]]
    common = [name for name in caches[0].sample_ids if all(name in held for held in others)]
    cards = []
    for sample_id in (common[i] for i in spread(len(common), num_shown)):
        records = [cache.read_record(sample_id) for cache in caches]
        told = [
            describe_record(record, decode, has_text=not cache.manifest.without_text)
            for cache, record, decode in zip(caches, records, decoders, strict=True)
        ]
        high = max([1e-6, *(value for each in told for value in _cells(each))])
        cards.append(
            {
                "sample_id": sample_id,
                "kind": records[0].kind,
                "picture": _picture(caches, sample_id) if records[0].visual else None,
                "prompt": told[0]["prompt"],
                "high": f"{high:.2f}",
                "levels": [
                    {"name": name, "maps": heat_cells(each, high), "words": _words(each, record)}
                    for name, each, record in zip(names, told, records, strict=True)
                ],
            }
        )
    return cards


def _cells(told: dict[str, Any]) -> list[float]:
    grids = [grid for image in told["images"] for grid in image["entropy_nats"]]
    return [value for grid in grids for line in grid for value in line if value is not None]


def _picture(caches: Sequence[CacheReader], sample_id: str) -> str | None:
    """A small copy, drawn anew: nothing of the file itself gets into the page."""
    for cache in caches:
        encoded = find_picture(cache, cache.index_of(sample_id), 0)
        if encoded is not None:
            try:
                image = decode_image(encoded, where=sample_id)
            except DataError:
                continue
            image.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
            return image_uri(image)
    return None


def _words(told: dict[str, Any], record: Record) -> list[dict[str, Any]]:
    """Response tokens, each with the share of the teacher's mass on it and what else it expected."""
    words = []
    for row in told["response"][:_SHOWN_WORDS]:
        tops = "\n".join(f"{_text(each)}  {each['probability']:.3f}" for each in row["teacher"])
        share = row["probability"] or 0.0
        words.append({"text": _text(row), "share": f"{share:.3f}", "top": tops, "unlikely": share < 0.5})
    return words


def _text(token: dict[str, Any]) -> str:
    if token["id"] is None:
        return "· "
    return f"#{token['id']}" if token["text"] is None else str(token["text"])
