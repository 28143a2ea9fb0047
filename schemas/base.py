"""The root of every contract model: frozen, strict about names, documented by attribute strings."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A value: compared field by field, never changed, unknown fields refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )
