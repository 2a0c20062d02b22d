"""Vision-language models against DPOTrainer: the language head is fused, pictures go through."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")
pytest.importorskip("PIL", reason="a processor of pictures needs Pillow")

import transformers
from PIL import Image
from shadow_cases import shadow
from trl_helpers import (
    BEFORE_5,
    VOCABULARY,
    conversational,
    make_pairs,
    make_tokenizer,
    one_thread,  # noqa: F401  a fixture
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

SIDE, PATCH = 8, 4  # pixels
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}


def make_processor() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}"
        "{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] }}"
        "{% endfor %}{{ ' <eos> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
    )
    of_images = "CLIPImageProcessor" if BEFORE_5 else "CLIPImageProcessorPil"
    return transformers.LlavaProcessor(
        image_processor=getattr(transformers, of_images)(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def make_vision_model(image_token: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=image_token,
        vision_feature_layer=-2,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.get_output_embeddings().weight.data *= 4
    return model


def with_images(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    generator = random.Random(0)

    def picture() -> Any:
        return Image.frombytes("RGB", (SIDE, SIDE), generator.randbytes(3 * SIDE * SIDE))

    return [row | {"images": [picture()]} for row in rows]


def setup_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    processor = make_processor()
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    return {
        "model": make_vision_model(image_token),
        "rows": rows,
        "keywords": {"processing_class": processor, "ref_model": make_vision_model(image_token)},
        "with_ref_model": False,
    }


def test_pictures_and_text_train_as_under_trl(tmp_path: Any) -> None:
    rows = with_images(conversational(make_pairs(8)))
    _, run = shadow(tmp_path, lambda: setup_of(rows), shares_prompts=False)
    assert all(call.batch["pixel_values"].shape == (8, 3, SIDE, SIDE) for call in run.calls)
    vision = [grad for name, grad in run.gradients[0].items() if "vision_tower" in name]
    assert max(grad.abs().max().item() for grad in vision) > 0


def test_text_alone_trains_a_vision_model_as_under_trl(tmp_path: Any) -> None:
    _, run = shadow(tmp_path, lambda: setup_of(make_pairs(8)), shares_prompts=False)
    assert all("pixel_values" not in call.batch for call in run.calls)
