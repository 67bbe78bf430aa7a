"""Turns texts and image files into labels with probabilities."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers

from hermes_async.engine.encoding import count_text_tokens, encode_pair, encode_texts, model_inputs, truncated
from hermes_async.engine.images import load_image
from hermes_async.engine.opening import OpenedModel
from hermes_async.engine.text_length import check_could_fit
from hermes_async.errors import CheckpointError, RequestError
from hermes_async.foreign_errors import first_line
from hermes_async.modeling.inputs import input_names
from hermes_async.results import Label
from hermes_async.serving.forward_passes import prepare_forward
from hermes_async.serving.jobs import ForwardJob


def prepare_classification(
    opened: OpenedModel, item: str | os.PathLike[str] | Sequence[str], *, truncate: bool
) -> ForwardJob:
    """Prepares a forward pass for a text, a pair of texts or an image file; for a worker thread.

    Its result is all labels, likeliest first.

    Raises:
        RequestError: The model does not classify texts or images, or the file is no image.
        ContextLengthError: The text is too long, and may not be truncated.
        CheckpointError: The checkpoint does not say how images are prepared.
        MemoryBudgetError: As `prepare_forward`.
    """
    model = opened.skeleton.model
    if isinstance(item, (tuple, list)) and (len(item) != 2 or not all(isinstance(text, str) for text in item)):
        raise RequestError(f"a pair is two texts, not {[type(text).__name__ for text in item]}")
    if not isinstance(item, (str, os.PathLike, tuple, list)):
        raise RequestError(f"a text, two texts or the path of an image is wanted, not {type(item).__name__}")
    if model.main_input_name == "pixel_values":
        if not isinstance(item, (str, os.PathLike)):
            raise RequestError(f"{type(model).__name__} takes the path of an image, not two texts")
        inputs = _image_inputs(opened.checkpoint.path, Path(item))
    else:
        inputs = _text_inputs(opened, item, truncate)

    def labels(output: Any) -> Sequence[Label]:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
            raise RequestError(f"{type(model).__name__} does not classify texts or images")
        independent = model.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
        scores = logits[0].float().sigmoid() if independent else logits[0].float().softmax(0)
        names = model.config.id2label or {}
        order = scores.argsort(descending=True).tolist()
        return [Label(str(names.get(idx, idx)), float(scores[idx])) for idx in order]

    return prepare_forward(opened, inputs, labels)


def _text_inputs(opened: OpenedModel, item: str | os.PathLike[str] | Sequence[str], truncate: bool) -> dict[str, Any]:
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise RequestError(f"a text needs a tokenizer: {opened.tokenizer_error}")
    if isinstance(item, os.PathLike):
        raise RequestError(f"a text is a str, not {type(item).__name__}")
    context, num_first = opened.skeleton.context_length, None
    if not truncate:
        for text in [item] if isinstance(item, str) else item:
            check_could_fit(tokenizer, text, context)
    if isinstance(item, str):
        (encoded,) = encode_texts(tokenizer, [item])
    else:
        encoded = encode_pair(tokenizer, *item)
        num_first = count_text_tokens(encode_texts(tokenizer, [item[0]])[0])
    if truncate:
        limits = [most for most in (context, tokenizer.model_max_length) if most is not None]
        encoded = truncated(tokenizer, encoded, min(limits), num_first) if limits else encoded
    if not encoded["input_ids"]:
        raise RequestError("the text has no tokens: the tokenizer puts none around it")
    names = input_names(opened.skeleton.model)  # some tokenizers give more
    return {name: torch.tensor([values]) for name, values in model_inputs(encoded).items() if name in names}


def _image_inputs(checkpoint: Path, file: Path) -> dict[str, Any]:
    pixels = load_image(file, where=str(file))
    processor = copy.deepcopy(_image_processor(checkpoint))  # another thread may use the same processor
    return dict(processor(images=pixels, return_tensors="pt"))


@lru_cache(maxsize=8)
def _image_processor(checkpoint: Path) -> Any:
    try:
        load: Any = transformers.AutoImageProcessor.from_pretrained
        return load(checkpoint, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        message = f"{checkpoint} does not say how images are prepared: {first_line(error)}"
        raise CheckpointError(message, path=checkpoint) from error
