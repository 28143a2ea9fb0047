"""A record in the student's own image positions, where its image processor is not the teacher's.

    cache      ■■■■■■■■■ q q a a       9 positions an image
    student    ▪▪▪▪ q q a a            4: ids and spans move, response rows keep their distributions

Distributions at image positions have no counterpart and are left out; the relation's factor stays on the
teacher's grid and is resampled where it is compared (`losses.relation.fit_factor`).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from common.grids import ImageLayout
from common.record import Record
from schemas.sample import Span


def regrid(record: Record, layouts: Sequence[ImageLayout]) -> Record:
    """Give every image of a record another number of positions.

    Args:
        record: As cached.
        layouts: The student's layout of each image, in order.

    Returns:
        The same sample with ids, spans, response positions and image starts moved, the images' tiles the
        student's, and no distributions at image positions.
    """
    images = [span for span in record.spans if span.kind == "image"]
    edges, shifts = _edges(images, layouts)
    pieces, at = [], 0
    for span, layout in zip(images, layouts, strict=True):
        mark = record.token_ids[span.start : span.start + 1]
        pieces += [record.token_ids[at : span.start], np.repeat(mark, layout.num_positions)]
        at = span.stop
    starts = _moved(np.array([span.start for span in images]), edges, shifts)
    visual = tuple(
        replace(image, start=int(start), num_positions=layout.num_positions, tiles=layout.tiles, topk=None)
        for image, start, layout in zip(record.visual, starts, layouts, strict=True)
    )
    # The token that a row predicts moves it: it may itself be an image's last.
    positions = (_moved(record.response.positions + 1, edges, shifts) - 1).astype(np.int32)
    return replace(
        record,
        token_ids=np.concatenate([*pieces, record.token_ids[at:]]),
        spans=tuple(_move_span(span, edges, shifts) for span in record.spans),
        response=replace(record.response, positions=positions),
        visual=visual,
    )


def _edges(
    images: Sequence[Span], layouts: Sequence[ImageLayout]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[I] ends of the images, and [I + 1] by how much a position moves after so many of them."""
    grown = [
        layout.num_positions - (span.stop - span.start) for span, layout in zip(images, layouts, strict=True)
    ]
    return np.array([span.stop for span in images], np.int64), np.cumsum([0, *grown])


def _moved(
    positions: NDArray[np.integer], edges: NDArray[np.int64], shifts: NDArray[np.int64]
) -> NDArray[np.int64]:
    moved: NDArray[np.int64] = positions + shifts[np.searchsorted(edges, positions, side="right")]
    return moved


def _move_span(span: Span, edges: NDArray[np.int64], shifts: NDArray[np.int64]) -> Span:
    start, stop = _moved(np.array([span.start, span.stop]), edges, shifts).tolist()
    return Span(kind=span.kind, start=start, stop=stop)
