"""How many pixels of an image a model sees, where its processor bounds them by area.

    own bounds of the model   [3,136, 12,845,056]     15,552 positions for a photo of 12 megapixels
    default of every command  at most 1,280 cells     1,003,520 pixels of 28 × 28, 1,310,720 of 32 × 32
    --max-pixels, --min-pixels                        always win
    a cache's manifest                                without flags a student uses its teacher's bounds

The Qwen-VL families scale an image so that its area is between two bounds and cut it into cells, each one
position. Other families have no such bound: theirs follow from a fixed size, a list of shapes or a number
of crops, and a flag that would have no effect is refused.

Bounds that were set are saved with the processor, beside the model's own (`model_pixels`), so that a saved
student keeps them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field

from common.errors import ConfigError

DEFAULT_CELLS: Final = 1280
"""Positions of the largest image without a flag: 1 to 1.3 megapixels."""
OWN_BOUNDS: Final = "model_pixels"
"""Attribute of an image processor whose bounds were set: [least, most] of the model itself."""

_BOUNDED: Final = "Qwen2VLImageProcessor"
_GOVERNING: Final = ("image_grid_pinpoints", "max_patches", "max_image_size", "crop_size", "size")
_PIXELS: Final = re.compile(
    r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:_[0-9]+)*)|([0-9]*\.?[0-9]+) ?mp", re.IGNORECASE
)
_MOST_CHARACTERS: Final = 30


def parse_pixels(text: object) -> object:
    """A number of pixels from `1003520`, `1,003,520` or `1.3MP`; other types are returned unchanged.

    Raises:
        ValueError: The text is none of these.
    """
    if not isinstance(text, str):
        return text
    if len(text.strip()) > _MOST_CHARACTERS:
        raise ValueError(
            f"wanted a number of pixels such as 1003520 or 1.3MP, found {len(text):,} characters: "
            f"{text.strip()[:_MOST_CHARACTERS]!r}…"
        )
    found = _PIXELS.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"wanted a number of pixels such as 1003520 or 1.3MP, found {text!r}")
    whole, mega = found.groups()
    return int(re.sub("[_,]", "", whole)) if whole else round(float(mega) * 1e6)


MOST_UPSCALED: Final = 1 << 24
"""Largest area that small images are scaled up to: a cache must not be able to exhaust a reader's memory."""

Pixels = Annotated[int, Field(ge=1, le=1 << 40), BeforeValidator(parse_pixels)]
LeastPixels = Annotated[int, Field(ge=1, le=MOST_UPSCALED), BeforeValidator(parse_pixels)]


@dataclass(frozen=True, slots=True)
class PixelBounds:
    """Area that an image is scaled into."""

    least: int
    """Pixels of the smallest image."""
    most: int
    """Pixels of the largest image."""

    @property
    def size(self) -> dict[str, int]:
        """In the names of image processors."""
        return {"shortest_edge": self.least, "longest_edge": self.most}

    @property
    def engine_arguments(self) -> dict[str, Any]:
        """As vLLM takes them for its own processor.

        By both names: `min_pixels` and `max_pixels` in a checkpoint's own settings would win over a size, and
        vLLM, whose cached processor is found by that size, would then load another for every request.
        """
        return {"size": self.size, "min_pixels": self.least, "max_pixels": self.most}


def read_bounds(processor: Any) -> PixelBounds | None:
    """The bounds a processor has; None for a family without any."""
    images = processor.image_processor
    names = {_stem(base.__name__) for base in type(images).__mro__}
    size = images.size if _BOUNDED in names else {}
    if not size or "shortest_edge" not in size or "longest_edge" not in size:
        return None
    return PixelBounds(int(size["shortest_edge"]), int(size["longest_edge"]))


def set_bounds(processor: Any) -> PixelBounds | None:
    """The bounds that replace those of the model itself; None where its own hold."""
    return read_bounds(processor) if hasattr(processor.image_processor, OWN_BOUNDS) else None


def bounds_in(image_settings: Mapping[str, Any]) -> PixelBounds | None:
    """The bounds that a manifest's `image_settings` name, if they do."""
    images = image_settings.get("image_processor")
    size = images.get("size") if isinstance(images, Mapping) else None
    if not isinstance(size, Mapping):
        return None
    least, most = size.get("shortest_edge"), size.get("longest_edge")
    if not (isinstance(least, int) and isinstance(most, int) and 1 <= least <= min(most, MOST_UPSCALED)):
        return None
    return PixelBounds(least, most)


def cell_pixels(processor: Any) -> int:
    """Pixels of one position, in a family with bounds."""
    images = processor.image_processor
    return int(images.patch_size * images.merge_size) ** 2


def apply_pixels(
    processor: Any, *, least: int | None, most: int | None, level: PixelBounds | None, default: bool
) -> None:
    """Set a processor's bounds in place: flags, else those of a level, else the default.

    Args:
        processor: A processor that passed `check_processor`.
        least: `--min-pixels`.
        most: `--max-pixels`.
        level: Bounds of the level that the processor is to fit, if it has any.
        default: Whether the default applies where neither flag nor level sets a bound.

    Raises:
        ConfigError: The family has no bounds, or an image could not keep to these.
    """
    own = read_bounds(processor)
    if own is None:
        if least is not None or most is not None:
            raise ConfigError(_refusal(processor, "--max-pixels" if least is None else "--min-pixels"))
        return
    cell, base = cell_pixels(processor), level or own
    lower = base.least if least is None else least
    upper = base.most
    if most is not None:
        upper = most
    elif level is None and default and not hasattr(processor.image_processor, OWN_BOUNDS):
        upper = min(own.most, max(DEFAULT_CELLS * cell, lower))
    _check(lower, upper, cell, asked=(least, most))
    if (lower, upper) != (own.least, own.most):
        _set(processor.image_processor, own, PixelBounds(lower, upper))


def _check(lower: int, upper: int, cell: int, *, asked: tuple[int | None, int | None]) -> None:
    if asked == (None, None):
        return
    if upper < cell:
        raise ConfigError(
            f"--max-pixels {upper} is less than one position of this model, which takes {cell} pixels; "
            f"give at least {cell}"
        )
    if lower > upper:
        said = ["the bound of model or cache" if flag is None else "as asked" for flag in asked]
        raise ConfigError(
            f"--min-pixels {lower} ({said[0]}) is more than --max-pixels {upper} ({said[1]}); "
            "give both so that the first is at most the second"
        )


def _set(images: Any, own: PixelBounds, wanted: PixelBounds) -> None:
    if not hasattr(images, OWN_BOUNDS):
        setattr(images, OWN_BOUNDS, [own.least, own.most])
    images.size = type(images.size)(**{**dict(images.size), **wanted.size})


def pixels_note(processor: Any) -> str | None:
    """One line about bounds that are not the model's own; None where nothing was set."""
    found = set_bounds(processor)
    if found is None:
        return None
    own = PixelBounds(*getattr(processor.image_processor, OWN_BOUNDS))
    positions = found.most // cell_pixels(processor)
    said = f"images are scaled to at most {found.most:,} pixels, {positions:,} positions"
    if found.least != own.least:
        said += f", and at least {found.least:,} pixels"
    return f"{said} (the model's own bounds are {own.least:,} to {own.most:,}); --max-pixels changes it"


def _refusal(processor: Any, flag: str) -> str:
    images = processor.image_processor
    name = next((each for each in _GOVERNING if getattr(images, each, None)), None)
    governs = "nothing that can be set" if name is None else f"{name} = {_shown(getattr(images, name))}"
    return (
        f"{flag} has no meaning for {type(processor).__name__}: its images follow from {governs} in "
        f"processor_config.json or preprocessor_config.json, not from a number of pixels; omit {flag}, or "
        "change that setting in "
        "copies of the models of teacher and student"
    )


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > 4:
        return f"{len(value)} shapes from {value[0]} to {value[-1]}"
    return str(value if isinstance(value, int | str | list | tuple) else dict(value))


def _stem(name: str) -> str:
    """A class's name without its back end."""
    return name.removesuffix("Fast").removesuffix("Pil")
