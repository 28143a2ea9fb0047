"""How far a dump is, from what it has sealed: for a running one, a stopped one, or one of another machine."""

from typing import Any

from common.cache.seals import read_manifest, read_seal, sealed_parts


def status(cache: str) -> dict[str, Any]:
    """Count what is sealed.

    Args:
        cache: Directory or URL of the cache.

    Raises:
        CacheError: There is no cache, or it is damaged.
    """
    manifest = read_manifest(cache)
    seals = [read_seal(cache, part) for part in sorted(sealed_parts(cache))]
    done = sum(seal.num_samples for seal in seals)
    size = sum(file.size_bytes for seal in seals for file in seal.files.values())
    rows = sum(seal.num_response_rows + seal.num_visual_rows for seal in seals)
    return {
        "cache": cache,
        "teacher": manifest.teacher.model,
        "sealed_parts": len(seals),
        "parts": manifest.num_parts,
        "samples_done": done,
        "samples": manifest.samples.num_samples,
        "quarantined": sum(len(seal.quarantined) for seal in seals),
        "rows": rows,
        "size_bytes": size,
        "bytes_per_row": size / rows if rows else None,
        "complete": len(seals) == manifest.num_parts,
    }
