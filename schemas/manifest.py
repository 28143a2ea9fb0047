"""A level's identity and the seal of a part: what binds a cache to its teacher, data and encoding.

    Manifest (root group attributes)          PartSeal (seals/00012/zarr.json)
      teacher, tokenizer, chat template         part, sample range, counts
      image processor, vocabulary               files: path -> size, sha256
      sample set, capture, relation             worst errors achieved by the encodings
      encoding, tools

Two manifests with equal `identity` fields may share a cache; `LOCATION_FIELDS` may differ.
"""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, JsonValue, model_validator

from schemas.base import Frozen

FORMAT_NAME: Final = "cascache"
FORMAT_VERSION: Final = 1

MAX_PARTS: Final = 1 << 20
"""No level has more parts: raise `part_samples` instead."""

Temperature = Annotated[float, Field(gt=0, le=1000)]

LOCATION_FIELDS = frozenset({"tools", "data_source", "derived_from"})
"""Manifest fields that say where and with what a cache was made, not what it is."""


class TeacherIdentity(Frozen):
    """Which weights answered."""

    model: str
    """The name it was asked for by: for people, not part of the identity."""
    revision: str | None = None
    """Commit of a hub model; None for a local directory."""
    weights_sha256: str
    """Hash over the weight files."""
    config_sha256: str = ""
    """Hash over `config.json`: rope scaling and the like change answers without changing weights."""
    model_type: str
    """`config.model_type`, such as `llava` or `qwen2_5_vl`."""
    dtype: str
    """Dtype the engine computed in: `float32`, `bfloat16`, `float16`."""
    head_dtype: str | None = None
    """Dtype that the head's product was computed in; None for `dtype`."""
    quantization: str | None = None
    """Engine quantisation, if any."""
    engine: dict[str, str] = {}
    """Engine arguments, `capture` and `batch_invariant` where they may change values; values as JSON."""


class Fingerprints(Frozen):
    """What must be equal for a student to fit. Equal means compatible; see `common.fingerprint`."""

    tokenizer: str
    """Token ids of a probe text plus the id of every token."""
    chat_template: str
    """What training text depends on: the template rendered on probe conversations."""
    image_processor: str
    """Settings that may change pixels or the number of image tokens: the hash of `image_settings`."""


class SampleSet(Frozen):
    """The data the level covers."""

    fingerprint: str
    """Over ids, turns and image references of all samples, in order."""
    num_samples: int = Field(ge=0, le=1 << 40)
    """Samples planned, quarantined ones included."""
    shuffle_seed: int | None = None
    """Seed of the order they were planned in; None for the data's own."""


class DataSource(Frozen):
    """Where the dump found its data; a hint, not identity."""

    path: str
    """The `--data` argument, resolved."""
    image_root: str | None = None
    """Directory that relative image paths start from."""


class Capture(Frozen):
    """What was kept of every row."""

    topk: int = Field(ge=1, le=1 << 20)
    """K at response positions."""
    visual_topk: int = Field(ge=1, le=1 << 20)
    """K at image positions."""
    topk_mass: float | None = Field(None, gt=0, le=1)
    """Keep fewer than K once this mass is reached; None keeps K always."""
    sampling: Literal["topk", "random", "topk+random"] = "topk"
    """How the kept ids were chosen."""
    sampling_draws: int = Field(0, ge=0, le=1 << 30)
    """Random draws a row, for the random modes."""
    temperatures: tuple[Temperature, ...] = Field((1.0,), min_length=1, max_length=64)
    """Temperatures whose logsumexp and tail were kept; the first is 1."""
    positions: Literal["response", "visual", "response+visual", "all"] = "response+visual"
    """Rows captured."""
    visual_fraction: float = Field(1.0, ge=0, le=1)
    """Share of each image's positions whose rows were kept, drawn at random."""
    seed: int = 0
    """Seed of every random choice the dump makes."""
    responses: Literal["data", "teacher"] = "data"
    """Teacher-forced on the data's responses, or on the teacher's own."""
    response_temperature: float = Field(0.0, ge=0)
    """Temperature the teacher's own responses were drawn at; 0 takes the likeliest token."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest response of the teacher's own; None for the data's."""
    max_len: int = Field(4096, ge=2)
    """Longest expanded sequence dumped."""


class Relation(Frozen):
    """How visual knowledge is stored."""

    store: Literal["factor", "hidden", "both", "none"] = "factor"
    """Relation factor, raw hidden states, both, or neither."""
    of: Literal["logits", "hidden"] = "logits"
    """R = Z Zᵀ of the vocabulary logits (LLaVA-KD), or R = H Hᵀ of the hidden states."""
    norm: Literal["none", "cosine"] = "none"
    """Rows as they are, or scaled to unit length first."""
    tolerance: float = Field(1e-3, gt=0)
    """Largest distance ‖R̂ − R̂_A‖ of the unit relation from that of its factor that the rank is chosen for.
    The relative error of an RDist gradient is at most this over sin θ, cos θ = 1 − RDist."""
    max_rank: int = Field(128, ge=1, le=1 << 20)
    """Largest rank kept."""
    hidden_encoding: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    """Encoding of raw hidden states."""


class Encoding(Frozen):
    """How arrays lie on disk."""

    profile: Literal["pcodec", "portable"] = "pcodec"
    """`pcodec`: smallest; `portable`: Blosc bitshuffle + zstd, readable by every Zarr v3 library."""
    logits: Literal["steps", "bfloat16", "float32"] = "steps"
    """Kept logits as whole steps, as exact bfloat16 bits, or as float32."""
    logit_step: float = Field(0.06, ge=1e-6, le=16)
    """Step in nats when `logits = "steps"`; the worst error is half of it."""


class Derived(Frozen):
    """What a cache was taken from that holds less than the dump did."""

    identity_sha256: str
    """Hash of the identity fields of the cache it was taken from."""
    left_out: tuple[str, ...]
    """Groups of arrays left out: `text`, `visual`, `relation`, `hidden`, `images`."""


class Manifest(Frozen):
    """A level's identity: the attributes of the root group."""

    format: Literal["cascache"] = FORMAT_NAME
    """Always `cascache`."""
    format_version: Literal[1] = FORMAT_VERSION
    """Version of FORMAT.md that the cache follows."""
    teacher: TeacherIdentity
    """Whose knowledge this is."""
    fingerprints: Fingerprints
    """What a student must match."""
    vocab_rows: int = Field(ge=1, le=1 << 24)
    """Rows of the teacher's head, padding included."""
    vocab_size: int = Field(ge=1, le=1 << 24)
    """Real tokens: ids at and above it never occur in text."""
    hidden_size: int = Field(ge=1, le=1 << 20)
    """Width D of the teacher's final hidden states."""
    samples: SampleSet
    """The data covered."""
    data_source: DataSource | None = None
    """Where the dump found the data."""
    capture: Capture
    """What was kept of every row."""
    relation: Relation = Relation()
    """How visual knowledge is stored."""
    encoding: Encoding = Encoding()
    """How arrays lie on disk."""
    part_samples: int = Field(ge=1, le=1 << 31)
    """Samples per part, except the last."""
    with_images: bool = False
    """Whether the encoded image files are in the cache, so that a student needs no other data."""
    without_text: bool = False
    """Whether token ids outside images were removed: the student re-tokenises them from the data."""
    derived_from: Derived | None = None
    """The fuller cache this one was taken from, if it is not a dump of its own."""
    image_settings: dict[str, JsonValue] = {}
    """Every setting of the image processor that its fingerprint covers; empty in caches before this field,
    whose fingerprint covers only some of them."""
    tools: dict[str, str] = {}
    """Versions of cascache, vllm, torch, transformers, zarr that wrote it."""

    @model_validator(mode="after")
    def _plans_few_parts(self) -> Self:
        if self.num_parts > MAX_PARTS:
            raise ValueError(f"{self.num_parts} parts, more than {MAX_PARTS}: raise part_samples")
        return self

    @property
    def num_parts(self) -> int:
        """Parts of the finished level."""
        return -(-self.samples.num_samples // self.part_samples)


class FileSeal(Frozen):
    """Size and hash of one file of a part."""

    size_bytes: int = Field(ge=0)
    """Length of the file."""
    sha256: str
    """Hex digest of its bytes."""


class Quarantined(Frozen):
    """A sample that could not be dumped, and why."""

    sample_id: str
    """Which sample."""
    reason: str
    """One word for counting: `image-missing`, `image-unreadable`, `too-long`, `image-marks`, ..."""
    detail: str
    """The whole message."""


class PartSeal(Frozen):
    """What makes a part final. What is not sealed does not exist."""

    part: int = Field(ge=0, lt=MAX_PARTS)
    """Index of the part."""
    directory: str
    """Name of the part's directory below `parts/`: its index and a random suffix."""
    identity_sha256: str
    """Hash of the manifest's identity fields: a part of another cache does not fit."""
    first_sample: int = Field(ge=0)
    """Plan index of the first sample."""
    num_samples: int = Field(ge=0)
    """Samples in the plan's range, quarantined ones included."""
    num_records: int = Field(ge=0)
    """Records held."""
    num_images: int = Field(ge=0)
    """Visual records held (one per image and prefix)."""
    num_response_rows: int = Field(ge=0)
    """Rows at response positions."""
    num_visual_rows: int = Field(ge=0)
    """Rows at image positions."""
    errors: dict[str, float] = {}
    """Worst error per encoding, measured against what the engine gave: name with unit -> value."""
    fidelity: dict[str, float] = {}
    """Summary statistics, such as `response_mass_p50`, `visual_entropy_p50_nats`."""
    derived_from: str | None = None
    """SHA-256 of the seal this part was taken from, when arrays were left out of it."""
    quarantined: tuple[Quarantined, ...] = ()
    """Samples of the range that hold no record."""
    files: dict[str, FileSeal]
    """Every file of the part, path relative to the part's directory."""
