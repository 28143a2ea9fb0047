"""What a record says, in numbers and words for people: `cascache show` and the gallery of `report`.

    rows ──> entropy, kept mass [N]
    image ──> grid of patches, NaN where no row was kept
    token ids ──> texts, where the cache's tokenizer is known; else the ids

Nothing here follows a name that a cache gives, except that of a shipped preset: what a cache says is text.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.cache.own_samples import OwnSamples
from common.cache.reader import CacheReader
from common.data.open import open_source, recorded_path
from common.errors import CascacheError, ConfigError, DataError, MismatchError
from common.fingerprint import tokenizer_fingerprint
from common.images import image_bytes
from common.models import PRESETS, resolve_model
from common.record import Record, TopK, VisualRecord
from schemas.manifest import Manifest

Floats = NDArray[np.float64]
Decode = Callable[[Sequence[int]], str]

TOP_TOKENS: Final = 5
"""Tokens of the teacher shown at each position."""


def entropy_nats(rows: TopK) -> Floats:
    """[N] entropy in nats, the mass outside the kept ids taken as one outcome: never above the true one."""
    logs = np.concatenate([rows.logprobs, rows.log_tail[:, :1]], axis=1).astype(np.float64)
    finite = np.where(np.isneginf(logs), 0.0, logs)
    out: Floats = np.maximum(-(np.exp(logs) * finite).sum(axis=1), 0.0)
    return out


def kept_mass(rows: TopK) -> Floats:
    """[N] probability on the kept ids."""
    out: Floats = np.clip(-np.expm1(rows.log_tail[:, 0].astype(np.float64)), 0.0, 1.0)
    return out


def patch_grids(image: VisualRecord, values: Floats) -> list[list[list[float | None]]]:
    """A value a patch, tile by tile, row by row; None where no row was kept.

    Args:
        image: Whose rows they are.
        values: [N] one value for each of the image's rows.
    """
    if image.topk is None:
        return []
    by_position = np.full(image.num_positions, np.nan)
    by_position[image.topk.positions - image.start] = values
    grids = []
    for tile in image.tiles:
        rows = tile.offset + np.arange(tile.rows)[:, None] * tile.stride + np.arange(tile.columns)
        cells = by_position[rows].tolist()
        grids.append([[None if value != value else value for value in line] for line in cells])
    return grids


def find_decoder(manifest: Manifest, model: str | None = None) -> Decode | None:
    """Token ids → text, or None when nobody knows the tokenizer.

    Args:
        manifest: Says which tokenizer it has to be.
        model: A model that has it; else the teacher, if that is a preset that lies on this machine.

    Raises:
        MismatchError: The model that was named has another tokenizer.
    """
    from common.processor import load_processor

    name = model or manifest.teacher.model
    if model is None and name not in PRESETS:
        return None
    try:
        found = resolve_model(name)
        tokenizer = load_processor(found.path_or_id, revision=found.revision).tokenizer
    except ConfigError:
        if model is not None:
            raise
        return None
    if tokenizer_fingerprint(tokenizer) != manifest.fingerprints.tokenizer:
        if model is not None:
            raise MismatchError(f"the tokenizer of {model} is not the cache's; name one that is, or none")
        return None
    return lambda ids: str(tokenizer.decode(list(ids)))


def find_picture(cache: CacheReader, index: int, image: int, *, data: str | None = None) -> bytes | None:
    """The encoded file of a record's image, if it can be found and is the one the teacher saw.

    Args:
        cache: Where the record is.
        index: Which record.
        image: Which of its images.
        data: Samples to look in; else the cache's own files, or where it says the dump found them.
    """
    source = cache.manifest.data_source
    wanted = cache.read_record(index).visual[image].image_sha256
    try:
        if data is None and cache.manifest.with_images:
            samples = OwnSamples(cache)
            return samples[index].images[image].data
        path = data or recorded_path(source.path if source else None)
        if path is None:
            return None
        root = source.image_root if source and data is None else None
        found = open_source(path, image_root=root)
        number = list(found.sample_ids()).index(cache.sample_ids[index])
        encoded = image_bytes(found[number].images[image], found.image_root)
    except (CascacheError, DataError, OSError, ValueError, IndexError):
        return None
    return encoded if hashlib.sha256(encoded).hexdigest() == wanted else None


def find_record(cache: CacheReader, sample_id: str) -> int:
    """Index of a sample.

    Raises:
        ConfigError: The cache does not hold it; names some that it holds.
    """
    try:
        return cache.index_of(sample_id)
    except KeyError as error:
        held = ", ".join(repr(name) for name in cache.sample_ids[:3])
        raise ConfigError(
            f"{cache.store.name} holds no sample {sample_id!r}; it holds {cache.num_samples}, such as {held}"
        ) from error


def describe_record(record: Record, decode: Decode | None, *, has_text: bool = True) -> dict[str, Any]:
    """A record as JSON: prompt, response token by token with the teacher's first choices, images as grids.

    Args:
        record: What to describe.
        decode: Token ids → text, if it is known.
        has_text: Whether the cache holds the token ids of texts; if not, only what was expected is told.
    """
    prompt = [
        i for s in record.spans if s.kind == "prompt" for i in record.token_ids[s.start : s.stop].tolist()
    ]
    return {
        "sample_id": record.sample_id,
        "kind": record.kind,
        "num_tokens": len(record.token_ids),
        "prompt_ids": prompt if has_text else None,
        "prompt": decode(prompt) if decode and has_text else None,
        "response": describe_rows(record, decode, has_text=has_text),
        "images": [_describe_image(image) for image in record.visual],
    }


def describe_rows(record: Record, decode: Decode | None, *, has_text: bool = True) -> list[dict[str, Any]]:
    """Each response token, what the teacher thought of it, and what it expected."""
    rows, told = record.response, []
    entropies, masses = entropy_nats(rows), kept_mass(rows)
    for row, position in enumerate(rows.positions.tolist()):
        target = int(record.token_ids[position + 1]) if has_text else None
        kept = rows.token_ids[row].tolist()
        used = int((rows.logprobs[row] > -np.inf).sum())
        place = kept.index(target) if target in kept[:used] else None
        shares = np.exp(rows.logprobs[row, :used].astype(np.float64)).tolist()
        top = [_token(kept[i], shares[i], decode) for i in range(min(TOP_TOKENS, used))]
        told.append(
            {
                "position": position + 1,
                **_token(target, None if place is None else shares[place], decode),
                "rank": None if place is None else place + 1,
                "entropy_nats": float(entropies[row]),
                "kept_mass": float(masses[row]),
                "teacher": top,
            }
        )
    return told


def _token(token_id: int | None, probability: float | None, decode: Decode | None) -> dict[str, Any]:
    text = decode([token_id]) if decode and token_id is not None else None
    return {"id": token_id, "text": text, "probability": probability}


def _describe_image(image: VisualRecord) -> dict[str, Any]:
    entropies = None if image.topk is None else entropy_nats(image.topk)
    return {
        "sha256": image.image_sha256,
        "start": image.start,
        "num_positions": image.num_positions,
        "relation_rank": None if image.factor is None else int(image.factor.shape[1]),
        "relation_error": image.factor_error,
        "entropy_nats": [] if entropies is None else patch_grids(image, entropies),
        "entropy_mean_nats": float(entropies.mean()) if entropies is not None and len(entropies) else None,
    }
