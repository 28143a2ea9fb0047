"""Settings of `student-train`. One model: flags, help text and the TOML table come from it."""

from typing import Annotated, Literal

from pydantic import Field

from common.processor import ProcessorOptions

Root = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Precision = Literal["fp32", "bf16"]


class TrainConfig(ProcessorOptions):
    """Train a student from one or more caches, with no teacher in memory."""

    cache: tuple[str, ...] = ("zarr/l1",)
    """A level's cache; give it several times to cascade, nearest teacher first."""
    expect: tuple[Root, ...] = ()
    """Root hash (sha256:...) that each --cache must have, in their order; `cascache info` prints it."""
    student: str | None = None
    """Preset, model directory or hub id; default: the smallest preset of the teacher's family."""
    data: str | None = None
    """Samples whose images are read; default: the path recorded in the cache."""
    image_root: str | None = None
    """Directory that relative image paths start from."""
    out: str | None = None
    """Run directory: checkpoints, metrics and the model; default: runs/<student>-<caches>."""
    recipe: str | None = None
    """`cascade` (dpt, sft, dft, then dft per level), `pt-sft`, `pt-sft-sft`, or a recipe.toml."""
    eval: str | None = None
    """Held-out samples to answer after training."""
    eval_steps: int | None = Field(None, ge=1)
    """Also answer them every N steps, and keep the best student so far in model-best/."""
    eval_limit: int | None = Field(None, ge=1)
    """Answer at most N questions per evaluation during training."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights, saved beside the student as model-ema/."""
    seed: int = Field(0, ge=0)
    """Seed of sample order and of every random choice."""
    micro_batch: int | None = Field(None, ge=1)
    """Samples per forward pass in each process; default: its whole share of the batch."""
    tokens_per_batch: int | None = Field(None, ge=1)
    """Real tokens per optimiser step instead of the recipe's batch sizes: less padding for ragged samples."""
    image_grid: Literal["teacher", "own"] = "teacher"
    """`own`: the student's image processor may differ; visual_kl is left out, relations are resampled."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass; weights and loss sums stay float32."""
    lora_rank: int | None = Field(None, ge=1)
    """Train adapters of this rank instead of the whole language model; they are merged into the result."""
    gradient_checkpointing: bool = False
    """Recompute the language model's activations in the backward pass: less memory, a third more time."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to train; `auto` takes the accelerators that are there."""
    workers: int = Field(2, ge=1)
    """Threads that read blocks and images ahead of the step."""
    prefetch: int = Field(4, ge=1)
    """Steps read ahead."""
    shuffle_blocks: int = Field(8, ge=1)
    """Blocks that are mixed with each other when the order is drawn."""
    pixel_cache_mb: int = Field(512, ge=0)
    """Memory for preprocessed pixels that are used again, in megabytes."""
    save_steps: int = Field(200, ge=1)
    """Steps from one checkpoint to the next; the last two are kept."""
    log_steps: int = Field(10, ge=1)
    """Steps that one line of metrics averages over."""
    tensorboard: bool = True
    """Write metrics for TensorBoard as well as metrics.jsonl."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps in all; the same command without it continues."""
    overfit_one_batch: bool = False
    """Debugging: every step of a stage sees the stage's first batch."""
    term_gradients: int | None = Field(None, ge=1)
    """Debugging: every N steps, log each term's gradient norm at the hidden states (`pull/...`)."""
    profile: bool = False
    """Debugging: write a torch profiler trace of a few steps to the run directory."""
    detect_anomaly: bool = False
    """Debugging: let autograd name the operation that made a NaN."""
    restart: bool = False
    """Forget the checkpoints of the run directory and start again."""
    dry_run: bool = False
    """Print levels, stages, steps and whether the student fits, and stop."""
    json_summary: bool = Field(False, alias="json")
    """Print the summary as JSON."""


class EvalConfig(ProcessorOptions):
    """Answer held-out questions with a model and score exact matches."""

    model: str
    """Model directory or preset."""
    data: str
    """Held-out samples; every assistant turn is a question with its reference."""
    image_root: str | None = None
    """Directory that relative image paths start from."""
    out: str | None = None
    """Where to write eval.json and answers.jsonl; nowhere when not given."""
    batch_size: int = Field(100, ge=1)
    """Questions generated together."""
    max_new_tokens: int = Field(32, ge=1)
    """Longest answer."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many questions."""
    json_summary: bool = Field(False, alias="json")
    """Print the result as JSON."""
