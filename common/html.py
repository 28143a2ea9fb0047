"""Self-contained HTML pages: one file, no network, light and dark, phone and desk.

Pages are Jinja templates in `common/templates/` with autoescape on: what stands in a cache or in a
data set is untrusted text.
"""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

_TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, **values: Any) -> str:
    """Return a template rendered with `values`; every value is escaped.

    Raises:
        jinja2.TemplateNotFound: No such template is shipped.
        jinja2.UndefinedError: The template names a value that was not given.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def image_uri(image: "Image") -> str:
    """Return an image as a `data:` URI (PNG), for pages that must not load anything."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
