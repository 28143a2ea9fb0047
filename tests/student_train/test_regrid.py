"""A student that sees images through a processor of its own."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from common.cache.reader import CacheReader
from common.chat import ImageInput, to_prompt
from common.data.open import open_source
from common.errors import ConfigError, MismatchError
from common.grids import ImageLayout, image_layout
from common.images import decode_image, image_bytes
from common.processor import load_processor
from scripts.tiny_models import save_model
from student_train.model import load_student
from student_train.regrid import regrid
from student_train.train import train
from tests.student_train.conftest import STUDENT


@pytest.fixture(scope="module")
def coarse(tmp_path_factory) -> Path:
    """The tiny student with 4 × 4 patches an image where the teacher has 6 × 6."""
    theirs = load_processor(STUDENT)
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer=theirs.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=theirs.chat_template,
    )
    config = load_student(STUDENT).model.config
    config.vision_config.image_size, config.image_seq_length = 32, 16
    directory = tmp_path_factory.mktemp("coarse") / "student"
    save_model(LlavaForConditionalGeneration(config), processor, directory)
    return directory


def test_a_moved_record_is_what_the_students_own_prompt_says(cache, shapes, coarse):
    """The slow twin: render, tokenise and expand the sample with the student's processor."""
    reader, source, processor = CacheReader(str(cache)), open_source(str(shapes)), load_processor(str(coarse))
    by_id = {sample.sample_id: sample for sample in source}
    for index in range(6):
        record = reader.read_record(index)
        sample = by_id[record.sample_id]
        encoded = [image_bytes(image, source.image_root) for image in sample.images]
        images = [decode_image(each, where="here") for each in encoded]
        inputs = [
            ImageInput(hashlib.sha256(each).hexdigest(), image.height, image.width)
            for each, image in zip(encoded, images, strict=True)
        ]
        wanted = to_prompt(processor, sample, inputs)
        moved = regrid(record, [image_layout(processor, each.height, each.width) for each in images])
        assert moved.token_ids.tolist() == wanted.token_ids.tolist()
        assert moved.spans == wanted.spans
        assert [(each.start, each.tiles) for each in moved.visual] == [
            (span.start, span.tiles) for span in wanted.images
        ]
        rows, theirs = moved.response.positions + 1, record.response.positions + 1
        assert moved.token_ids[rows].tolist() == record.token_ids[theirs].tolist()


def test_equal_layouts_move_nothing(cache):
    record = CacheReader(str(cache)).read_record(0)
    same = regrid(record, [ImageLayout(each.num_positions, each.tiles) for each in record.visual])
    assert same.token_ids.tolist() == record.token_ids.tolist()
    assert same.spans == record.spans
    assert same.response.positions.tolist() == record.response.positions.tolist()


def test_a_row_on_an_images_last_position_moves_with_its_token(cache):
    record = CacheReader(str(cache)).read_record(0)
    image = record.visual[0]
    last = image.start + image.num_positions - 1
    at_end = replace(record, response=replace(record.response, positions=np.array([last], np.int32)))
    moved = regrid(at_end, [ImageLayout(16, ())])
    assert moved.response.positions.tolist() == [image.start + 15]


def test_another_processor_trains_only_when_told_to(config, coarse, tmp_path):
    recipe = tmp_path / "own.toml"
    stage = '{name = "dft", steps = 30, batch_size = 8, terms = {ce = 1, response_kl = 1, relation = 0.5}}'
    recipe.write_text(f'base = "tiny"\n[[levels]]\nstages = [{stage}]')
    other = config.model_copy(update={"student": str(coarse), "recipe": str(recipe)})
    with pytest.raises(MismatchError, match="image processor differs"):
        train(other)
    with pytest.raises(ConfigError, match="no targets for it at the student's own image positions"):
        train(other.model_copy(update={"image_grid": "own", "recipe": config.recipe}))
    train(other.model_copy(update={"image_grid": "own"}))
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.9 * lines[0]["loss"]
    assert lines[-1]["raw/relation"] < lines[0]["raw/relation"]
