"""Tiny models that generate from texts and images, saved with their processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 512,
}  # fmt: skip

_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


class ImageModel:
    """A tiny model, and what transformers answers with it.

    Attributes:
        placeholder: What stands for an image in a rendered prompt.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        torch.manual_seed(0)
        model, tokenizer, image_processor, processor = getattr(self, f"_{name}")()
        self.placeholder = str(processor.pop("placeholder"))
        tokenizer.chat_template = _TEMPLATE.replace("IMAGE", str(processor.pop("shown")))
        embedding = model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():  # far larger than at the start of a training, so that answers vary
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.05 if parameter is embedding else 0.3, generator=generator)
                else:
                    parameter += torch.empty_like(parameter).normal_(0, 0.1, generator=generator)
        model.generation_config = GenerationConfig()
        self.model: PreTrainedModel = model.eval()
        self.model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        image_processor.save_pretrained(path)
        (path / "processor_config.json").write_text(json.dumps(processor))

    @staticmethod
    def _tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
        """One token for each byte, and special ones; `named` are attributes of the tokenizer."""
        vocabulary = {byte: idx for idx, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", extra_special_tokens=named)
        fast.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
        return fast

    def _qwen(self) -> tuple[Any, Any, Any, dict[str, Any]]:
        names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        tokenizer = self._tokenizer(*names)
        start, end, image, video = tokenizer.convert_tokens_to_ids(list(names))
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        config = Qwen2_5_VLConfig(
            text_config={**_TEXT, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": None},
            vision_config={
                "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
                "patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
            },
            image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        )  # fmt: skip
        size = {"shortest_edge": 64, "longest_edge": 4096}
        images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
        processor = {
            "processor_class": "Qwen2_5_VLProcessor",
            "placeholder": "<|image_pad|>",
            "shown": "<|vision_start|><|image_pad|><|vision_end|>",
        }
        return Qwen2_5_VLForConditionalGeneration(config), tokenizer, images, processor

    def _gemma(self) -> tuple[Any, Any, Any, dict[str, Any]]:
        named = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<piece>"}
        tokenizer = self._tokenizer(**named)
        begin, end, piece = tokenizer.convert_tokens_to_ids(list(named.values()))
        layers = ["sliding_attention", "full_attention"]
        config = Gemma3Config(
            text_config={**_TEXT, "head_dim": 8, "sliding_window": 16, "layer_types": layers,
                         "query_pre_attn_scalar": 8},
            vision_config={**_VISION, "image_size": 32, "patch_size": 4, "model_type": "siglip_vision_model",
                           "vision_use_head": False},
            mm_tokens_per_image=4, boi_token_index=begin, eoi_token_index=end, image_token_index=piece,
        )  # fmt: skip
        images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
        processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
        processor.update(placeholder="<boi>", shown="<boi>")
        return Gemma3ForConditionalGeneration(config), tokenizer, images, processor

    def _mixture(self) -> tuple[Any, Any, Any, dict[str, Any]]:
        return self._llava(model_type="mixtral", num_local_experts=16)

    def _llava(self, **text: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
        tokenizer = self._tokenizer(image_token="<image>")
        config = LlavaConfig(
            text_config={"model_type": "llama", **_TEXT, **text},
            vision_config={**_VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16,
        )  # fmt: skip
        images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        processor = {
            "processor_class": "LlavaProcessor", "patch_size": 4, "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1, "placeholder": "<image>", "shown": "<image>",
        }  # fmt: skip
        return LlavaForConditionalGeneration(config), tokenizer, images, processor


NAMES = ("qwen", "gemma", "llava")


def picture(seed: int, width: int = 40, height: int = 56) -> Image.Image:
    """An image of random pixels."""
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def message(*parts: Any) -> dict[str, Any]:
    """A message of the user; texts are text parts, everything else is an image."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}
