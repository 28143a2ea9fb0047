"""Settings of `teacher-dump` and `teacher-dump verify`: every field is a flag and a key in cascache.toml."""

from typing import Any, Literal

from pydantic import Field, model_validator

from common.processor import ProcessorOptions
from schemas.manifest import Encoding


class DumpConfig(ProcessorOptions):
    """Run a teacher once over a data set and keep what it knows in a cache."""

    model: str = "tiny"
    """Teacher: a preset (tiny, 0.5b, 7b, 72b, qwen3-vl-8b, ...), a model directory, or a hub id."""
    data: str = "shapes"
    """LLaVA JSON, JSONL of messages, a datasets directory, hf:owner/name:split, `shapes`; images to --ask."""
    image_root: str | None = None
    """Directory that relative image paths start from; the data file's own by default."""
    out: str = "auto"
    """Directory of the cache; auto is ./zarr/l1, or the next level when that holds another dump."""
    topk: int = Field(64, ge=1, le=1 << 20)
    """Tokens kept per response position."""
    visual_topk: int | None = Field(None, ge=1, le=1 << 20)
    """Tokens kept per image position; as many as --topk by default."""
    topk_mass: float | None = Field(None, gt=0, le=1)
    """Keep fewer ids once they hold this share of the probability."""
    sampling: Literal["topk", "random", "topk+random"] = "topk"
    """Keep the likeliest ids, ids drawn at random, or the likeliest and draws from the rest (unbiased)."""
    sampling_draws: int = Field(0, ge=0)
    """Random draws a position in the random modes; 50 by default."""
    positions: Literal["response+visual", "response", "visual"] = "response+visual"
    """Rows kept."""
    visual_fraction: float = Field(1.0, ge=0, le=1)
    """Share of each image's rows kept, drawn at random: an unbiased sample at a fraction of the bytes;
    0 keeps none, relations stay."""
    responses: Literal["data", "teacher"] = "data"
    """Score the data's responses, or let the teacher answer every turn itself; then data needs no answers."""
    response_temperature: float = Field(0.0, ge=0)
    """Temperature of the teacher's own responses; 0 takes the likeliest token."""
    response_samples: int = Field(1, ge=1)
    """Responses of its own per sample, each drawn with a seed of its own."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest response of the teacher's own."""
    ask: str | None = None
    """File with a question a line: forget the data's text, ask these about its images, keep the answers."""
    asks_per_image: int = Field(3, ge=1)
    """Questions drawn for each image with --ask."""
    temperature: tuple[float, ...] = ()
    """Further temperatures whose normaliser and tail are kept; may be given several times."""
    max_len: int = Field(16384, ge=2)
    """Longest sequence dumped, image positions included (at most what the teacher takes); longer ones
    are quarantined. A 1920 × 1080 image alone takes 7,269 positions of LLaVA-OneVision."""
    limit: int | None = Field(None, ge=1)
    """Dump only the first so many samples."""
    shuffle_seed: int | None = Field(None, ge=0)
    """Dump samples in a random order: with --limit a random share, and a stopped dump is one, too."""
    part_samples: int | None = Field(None, ge=1)
    """Samples a part, the unit of resuming; chosen from the size of the data by default."""
    relation_store: Literal["factor", "hidden", "both", "none"] = "factor"
    """Per image: the relation's factor, the raw hidden states, both, or neither."""
    relation_of: Literal["logits", "hidden"] = "logits"
    """Relate vocabulary logits (LLaVA-KD) or hidden states."""
    relation_norm: Literal["none", "cosine"] = "none"
    """Rows as they are, or scaled to unit length first."""
    relation_tolerance: float = Field(1e-3, gt=0)
    """Error that the factor's rank is chosen for."""
    relation_max_rank: int = Field(128, ge=1)
    """Largest rank kept."""
    hidden_encoding: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    """Encoding of raw hidden states."""
    with_images: bool = False
    """Keep the encoded image files too, each once: then a student needs nothing but the cache."""
    profile: Literal["pcodec", "portable"] = "pcodec"
    """pcodec: smallest; portable: readable by every Zarr v3 library."""
    logits: Literal["steps", "bfloat16", "float32"] = "steps"
    """Encoding of kept logits."""
    logit_step: float = Field(Encoding.model_fields["logit_step"].default, ge=1e-6, le=16)
    """Step of kept logits in nats when they are kept as steps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the teacher computes in; auto takes what its weights are in."""
    head_dtype: Literal["float32", "auto", "bfloat16", "float16"] = "float32"
    """What the head's product is computed in; auto takes the teacher's own, which rounds logits coarsely
    unless it is float32."""
    quantization: str | None = None
    """vLLM's name of a quantisation to load the weights in."""
    prefix_cache: bool = True
    """Compute an image once for all questions on it, through vLLM's prefix cache."""
    max_num_seqs: int = Field(64, ge=1)
    """Samples computed at a time."""
    tensor_parallel: int = Field(1, ge=1)
    """Devices that each layer is spread over."""
    pipeline_parallel: int = Field(1, ge=1)
    """Groups of devices that the layers are spread over."""
    workers: int = Field(1, ge=1)
    """Engines that dump parts side by side, through Ray; each on its own share of cores or GPUs."""
    ray: str | None = None
    """Address of a Ray cluster for the workers (`auto`: the one this machine is in); else this machine."""
    engine_process: Literal["auto", "own", "same"] = "auto"
    """Run vLLM in a process of its own or in this one; auto: in this one on a CPU with one worker."""
    batch_invariant: bool = False
    """Values that do not depend on which samples are computed together (GPUs; slower)."""
    engine_arg: tuple[str, ...] = ()
    """Any other vLLM engine argument as key=value; may be given several times."""
    capture: Literal["hooks", "prompt-logprobs"] = "hooks"
    """Take rows out of vLLM through private attributes, or through its public prompt_logprobs: slower, no
    relations, no hidden states, no further temperature; for a vLLM in which those attributes are gone."""
    any_vllm: bool = False
    """Try a vLLM release that was neither tested nor checked by its source."""
    max_quarantine: float = Field(0.05, ge=0, le=1)
    """Largest share of samples that may be unusable before the dump stops."""
    max_engine_restarts: int = Field(64, ge=0)
    """Times that an engine that died is started again in one run, to find the sample that kills it; 0 ends
    the dump at the first death."""
    threads: int = Field(4, ge=1)
    """Threads that read images and tokenise ahead of the engine."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of every random choice."""
    status: bool = False
    """Say how far the dump at --out is, running or stopped, and stop."""
    dry_run: bool = False
    """Print the plan with an estimate of size and time, and stop."""
    sample_estimate: int | None = Field(None, ge=1)
    """With the plan: dump so many random samples for real, throw them away, extrapolate with an interval."""
    json_: bool = Field(False, alias="json")
    """Print the plan or the result as JSON."""

    @model_validator(mode="after")
    def _check(self) -> "DumpConfig":
        for pair in self.engine_arg:
            if "=" not in pair:
                raise ValueError(f"--engine-arg {pair!r} is not key=value")
        if any(each <= 0 for each in self.temperature):
            raise ValueError(f"--temperature must be positive, found {min(self.temperature)}")
        return self

    @model_validator(mode="after")
    def _check_responses(self) -> "DumpConfig":
        if self.response_samples > 1 and self.response_temperature == 0:
            raise ValueError(
                "--response-samples above 1 needs --response-temperature above 0: the likeliest is one"
            )
        asked = self.response_samples > 1 or self.response_temperature > 0
        if asked and not self.teacher_answers:
            raise ValueError("--response-temperature and --response-samples need --responses teacher")
        return self

    @model_validator(mode="after")
    def _check_sampling(self) -> "DumpConfig":
        if self.sampling == "topk" and self.sampling_draws:
            raise ValueError("--sampling-draws needs --sampling random or topk+random")
        if self.sampling != "topk" and self.topk_mass is not None:
            raise ValueError("--topk-mass goes with --sampling topk only")
        return self

    @model_validator(mode="after")
    def _check_capture(self) -> "DumpConfig":
        if self.capture == "hooks":
            return self
        if "visual" in self.positions and self.relation_store != "none":
            raise ValueError(
                "--capture prompt-logprobs sees no hidden states; it needs --relation-store none"
            )
        if self.temperature or self.sampling != "topk":
            raise ValueError("--capture prompt-logprobs knows the likeliest ids at temperature 1 only")
        return self

    @property
    def plans_only(self) -> bool:
        """Whether nothing is to be dumped."""
        return self.dry_run or self.sample_estimate is not None

    @property
    def relates_logits(self) -> bool:
        """Whether relations of the vocabulary logits are kept, which need the head's weight."""
        kept = "visual" in self.positions and self.relation_store in ("factor", "both")
        return kept and self.relation_of == "logits"

    @property
    def draws(self) -> int:
        """Random draws a position; 0 in the mode topk."""
        return 0 if self.sampling == "topk" else self.sampling_draws or 50

    @property
    def teacher_answers(self) -> bool:
        """Whether the teacher gives the responses."""
        return self.responses == "teacher" or self.ask is not None

    @property
    def engine_arguments(self) -> dict[str, Any]:
        """`--engine-arg` pairs, values read as JSON where they are JSON."""
        return {
            key.replace("-", "_"): _value(text)
            for key, _, text in (each.partition("=") for each in self.engine_arg)
        }


class AuditConfig(ProcessorOptions):
    """Compute a random handful of a cache's samples again, and say how far the cache is from them."""

    cache: str = "zarr/l1"
    """Directory or URL of the cache; may stand without its flag."""
    sample: int = Field(32, ge=1)
    """Samples computed again."""
    model: str | None = None
    """The teacher, where the name in the cache does not lead to it."""
    data: str | None = None
    """The samples; where the cache says the dump found them by default."""
    image_root: str | None = None
    """Directory that relative image paths start from."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What to compute in; auto takes the level's own, whose rounding the cache shares."""
    device: str = "auto"
    """Where: cpu, cuda, cuda:1; auto takes a GPU that holds the teacher, all GPUs, or the CPU."""
    max_kl: float | None = Field(None, gt=0)
    """Largest mean divergence, in nats, that still passes; chosen from encoding and dtype by default."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Of the draw."""
    json_: bool = Field(False, alias="json")
    """Print the result as JSON."""


def _value(text: str) -> Any:
    import json

    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text
