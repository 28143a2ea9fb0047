"""The only door to transformers' model classes: load a student, freeze it, reach its pieces, save it.

    pixels ──> tower (always frozen) ──> projector ──┐
    token ids ──> embeddings ────────────────────────┴─> llm ──> hidden [B, T, D] ──> head [V, D]

The head is not applied here: the objective runs it on the rows that a term needs and on no others.
Where the pieces lie is one table, `FAMILIES`; another family needs one line there.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from common.errors import ConfigError, MismatchError
from common.render import end_token
from student_train.batch import Batch
from student_train.losses.balance import UncertaintyWeights
from student_train.losses.objective import Counts, Objective, Outcome
from student_train.losses.rows import Head
from student_train.recipe import ModulePart
from student_train.sync import sync_directory, sync_tree

Part = Literal["tower", "projector", "llm", "base", "balance"]
"""`base` is the language model under adapters: frozen, while the adapters are the `llm` that trains."""


@dataclass(frozen=True, slots=True)
class Family:
    """Where the pieces of one kind of model lie: prefixes of its parameter names."""

    tower: str
    """The vision encoder."""
    projector: tuple[str, ...]
    """What carries image features into the language model, inside the tower's prefix or outside."""
    token_types: bool = False
    """The forward pass wants `mm_token_type_ids`."""
    hub_tower: str | None = None
    """Prefix that hub checkpoints and vLLM put after `vision_tower.`; transformers 5 leaves it out."""


_LLAVA: Final = Family("model.vision_tower.", ("model.multi_modal_projector.",), hub_tower="vision_model.")
_ONEVISION: Final = Family(
    "model.vision_tower.",
    ("model.multi_modal_projector.", "model.image_newline"),
    hub_tower="vision_model.",
)
_INTERNVL: Final = Family("model.vision_tower.", ("model.multi_modal_projector.",))
_QWEN: Final = Family("model.visual.", ("model.visual.merger.",), token_types=True)
_QWEN3: Final = Family(
    "model.visual.", ("model.visual.merger.", "model.visual.deepstack_merger_list."), token_types=True
)

FAMILIES: Final[dict[str, Family]] = {
    "llava": _LLAVA,
    "llava_onevision": _ONEVISION,
    "internvl": _INTERNVL,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN3,
}
"""Families by `config.model_type`."""


@dataclass(frozen=True, slots=True)
class StudentShape:
    """What is known of a student before its weights are read."""

    model_type: str
    """`config.model_type`."""
    vocab_rows: int
    """Rows of the head, padding included."""
    hidden_size: int
    """Width D of the language model."""
    image_token_id: int
    """Id that marks image positions."""

    @property
    def is_tiny(self) -> bool:
        """Whether the `tiny` recipe fits it better than the paper's."""
        return self.hidden_size < 512


def read_shape(path: str, *, revision: str | None = None) -> StudentShape:
    """Read a student's configuration, without weights.

    Args:
        path: Directory or hub id.
        revision: Revision of a hub model.

    Raises:
        ConfigError: No model there, or one of a family that is not in `FAMILIES`.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{path} holds no model configuration ({error}); point --student at a model"
        ) from error
    family_of(config.model_type, path)
    text = config.get_text_config()
    return StudentShape(config.model_type, text.vocab_size, text.hidden_size, config.image_token_id)


def family_of(model_type: str, path: str) -> Family:
    """Return where the pieces of a model type lie.

    Raises:
        ConfigError: The type is not in the table; says what to add.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise ConfigError(
            f"{path} is of type {model_type!r}; students can be {', '.join(FAMILIES)}. To add it, name its "
            f"tower and projector prefixes in FAMILIES of student_train/model.py"
        )
    return family


class Student(nn.Module):
    """A vision-language model whose pieces are known. Axes: B batch, T length, D width, V vocabulary."""

    def __init__(self, model: Any, path: str) -> None:
        """Wrap a loaded model.

        Args:
            model: An `AutoModelForImageTextToText`.
            path: Where it came from, for messages.

        Raises:
            ConfigError: Its family is unknown, or its head is not linear.
        """
        super().__init__()
        self.model: Any = model
        self.path = path
        self.balance: UncertaintyWeights | None = None
        self._adapters: Any = None
        self.family = family_of(model.config.model_type, path)
        text = model.config.get_text_config()
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(text, name, None) not in (None, 1.0):
                raise ConfigError(
                    f"{path} has {name} = {getattr(text, name)}: its logits are not linear in the hidden "
                    f"states, which the losses rely on; choose a student without it"
                )

    def part_of(self, name: str) -> Part:
        """Return which part a parameter belongs to, by its name in `named_parameters()`."""
        inner = name.removeprefix("model.")
        if name.startswith("balance."):
            return "balance"
        if inner.startswith(self.family.projector):
            return "projector"
        if inner.startswith(self.family.tower):
            return "tower"
        return "llm" if self._adapters is None or ".lora_" in name else "base"

    def parameters_of(self, part: Part) -> Iterator[nn.Parameter]:
        """Yield a part's parameters, shared ones once."""
        return (value for name, value in self.named_parameters() if self.part_of(name) == part)

    def freeze_but(self, trains: tuple[ModulePart, ...]) -> None:
        """Let the named parts learn and nothing else; the tower stays in evaluation mode."""
        for name, value in self.named_parameters():
            value.requires_grad_(self.part_of(name) in (*trains, "balance"))
            value.grad = None
        self.train()

    def train(self, mode: bool = True) -> "Student":
        """Set training mode, except for the tower, which is frozen in every stage."""
        super().train(mode)
        self.model.get_submodule(self.family.tower.rstrip(".")).eval()
        return self

    @property
    def head_weight(self) -> Tensor:
        """[V, D] rows of the head; the embedding's own when they are tied."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V] bias of the head, if it has one."""
        return getattr(self.model.get_output_embeddings(), "bias", None)

    def forward(self, batch: Batch, objective: Objective, counts: Counts, vocab_size: int) -> Outcome:
        """Return the loss of a micro-batch.

        Everything that touches a weight happens in here, so that wrappers which gather or synchronise
        weights around a forward pass (DDP, FSDP) see all of it.

        Args:
            batch: Inputs and targets, on the student's device.
            objective: The stage's terms.
            counts: Denominators over the whole step.
            vocab_size: Real tokens; rows of the head above it pad it.
        """
        head = Head(self.head_weight, self.head_bias, vocab_size)
        return objective(self.hidden(batch.inputs), head, batch, counts)

    def hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the final hidden states, after the last norm: what the head reads.

        Args:
            inputs: `Batch.inputs`.

        Returns:
            [B, T, D] hidden states. Without pixels they still depend on the projector, by zero times
            its sum, so that every process has a gradient for every trained weight.
        """
        output = self.model.model(**inputs, use_cache=False, return_dict=True)
        hidden: Tensor = output.last_hidden_state
        if "pixel_values" not in inputs:
            trained = [value for value in self.parameters_of("projector") if value.requires_grad]
            hidden = hidden + sum((value.sum() * 0 for value in trained), start=hidden.new_zeros(()))
        return hidden

    def add_adapters(self, rank: int, *, seed: int) -> None:
        """Put low-rank adapters on every linear layer of the language model; the layers themselves freeze.

        Args:
            rank: Of each adapter; its scale is 2.
            seed: Of its random half.

        Raises:
            ConfigError: peft is not installed.
        """
        try:
            from peft import LoraConfig
            from peft.tuners.lora import LoraModel
        except ImportError as error:
            raise ConfigError("--lora-rank needs peft; install cascache[lora]") from error
        layers = [
            name
            for name, layer in self.model.named_modules()
            if name.startswith("model.language_model.") and isinstance(layer, nn.Linear)
        ]
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=layers)
        self._adapters = (LoraModel(self.model, config, "default"),)

    @property
    def has_adapters(self) -> bool:
        """Whether `add_adapters` put adapters on that have not been merged."""
        return self._adapters is not None

    def merge_adapters(self) -> None:
        """Add the adapters into the layers and take them off: what is left is a plain model."""
        if self._adapters is not None:
            self.model = self._adapters[0].merge_and_unload()
            self._adapters = None

    def recompute_activations(self) -> None:
        """Trade time for memory: recompute the language model's activations in the backward pass."""
        language: Any = self.model.model.language_model
        newer = getattr(language, "activation_checkpointing_enable", None)  # the name since transformers 5.20
        (newer or language.gradient_checkpointing_enable)({"use_reentrant": False})


def load_student(path: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Student:
    """Load a model directory, or a hub model when the network may be used.

    Args:
        path: Directory or hub id.
        revision: Revision of a hub model.
        dtype: What the weights are held in.

    Raises:
        ConfigError: It is not there, is of an unknown family, or lacks weights.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    read_shape(path, revision=revision)
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, revision=revision, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no weights that transformers can load ({error})") from error
    if report["missing_keys"]:
        raise ConfigError(
            f"{path} lacks weights {sorted(report['missing_keys'])[:3]}...: they would start at random; "
            f"fix the directory"
        )
    return Student(model, path)


def save_student(
    student: Student,
    processor: Any,
    directory: Path,
    *,
    card: str,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a model directory that transformers' auto classes, the processor and vLLM load.

    It is written under a temporary name and renamed, so a directory that exists is whole.

    Args:
        student: The student.
        processor: The processor it was trained with.
        directory: Where to; must not exist.
        card: Text of its README.md.
        weights: The model's state, where it has been gathered from several processes.
    """
    if directory.exists():
        raise MismatchError(f"{directory} exists already; move it away to save the model there")
    temporary = directory.with_name(f".{directory.name}.tmp{os.getpid()}")
    tokenizer, generation = processor.tokenizer, student.model.generation_config
    stops = stop_ids(student.model, processor)
    generation.eos_token_id = stops if len(stops) > 1 else stops[0] if stops else None
    generation.pad_token_id = generation.pad_token_id or tokenizer.pad_token_id
    _complete_sampling(generation)
    student.model.save_pretrained(temporary, state_dict=weights)
    processor.save_pretrained(temporary)
    if student.family.hub_tower:
        _rename_tower(temporary, student.family.hub_tower)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    sync_tree(temporary)
    temporary.replace(directory)
    sync_directory(directory.parent)


def _complete_sampling(generation: Any) -> None:
    """Set `do_sample` for a model whose files set a temperature without it, as old checkpoints do.

    transformers 5 reads such a file and refuses to write it: a run would end without its student.
    """
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def stop_ids(model: Any, processor: Any) -> list[int]:
    """Ids that end an answer: those the model names, the tokenizer's, and what the template trains."""
    named = model.generation_config.eos_token_id
    ids = [*(named if isinstance(named, list) else [named]), processor.tokenizer.eos_token_id]
    token = end_token(processor)
    if token is not None:
        ids.append(processor.tokenizer.convert_tokens_to_ids(token))
    return sorted({int(each) for each in ids if each is not None})


def _rename_tower(directory: Path, hub_tower: str) -> None:
    """Give the tower's weights the names that hub checkpoints have and vLLM reads."""
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    def renamed(name: str) -> str:
        wanted = f"vision_tower.{hub_tower}"
        misses = name.startswith("vision_tower.") and not name.startswith(wanted)
        return name.replace("vision_tower.", wanted, 1) if misses else name

    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            weights = {renamed(name): shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        save_file(weights, file, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.exists():
        table = json.loads(index.read_text("utf-8"))
        table["weight_map"] = {renamed(name): file for name, file in table["weight_map"].items()}
        index.write_text(json.dumps(table, indent=2))
