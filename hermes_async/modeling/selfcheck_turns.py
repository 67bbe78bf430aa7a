"""Checks, before a model is run in turns, that its tokens are those of transformers' `generate`.

A small copy of the model with random weights runs twice: `generate` decides and reports the logits of each step, and
then turns compute the same tokens, in other portions and beside another sequence. What an architecture cannot do is
found out here: some compute several tokens right only at the beginning of a sequence, and some cannot remove tokens
again.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hermes_async.errors import UnsupportedModelError
from hermes_async.modeling.encoder_inputs import example_encoder_inputs
from hermes_async.modeling.generation_api import generated_logits
from hermes_async.modeling.module_state import ModuleState, tensor_attributes
from hermes_async.modeling.selfcheck import TOLERANCE, noise, not_checked, small_copies
from hermes_async.modeling.skeleton import build_model
from hermes_async.modeling.turns import TurnCache, TurnInput, Turns, TurnTraits

logger = logging.getLogger(__name__)

_PROMPT = (5, 9, 2, 9, 5, 9, 9, 5, 9)
"""Tokens occur several times, because some architectures choose keys by scores, which are then equal."""

_OTHER_PROMPT = (11, 3, 50, 7)
_NUM_STEPS = 4
_CHUNKS = (4, 3, 2)
_WRONG = (12, 44)
_ENCODED, _OTHER_ENCODED = (7, 31, 2, 18, 40, 7), (3, 21, 50)
"""What the encoders of encoder-decoders get."""


def check_turns(config: PreTrainedConfig) -> TurnTraits:
    """Compares turns with `generate` on a small copy of the model of `config`.

    Raises:
        UnsupportedModelError: They differ; or no copy of the model could be run.
    """
    reason: Exception | None = None
    for small in small_copies(config):
        try:
            traits = _traits(small)
        except Exception as error:  # the small copy does not run: try one with fewer changes
            logger.debug("self-check of %s in turns: %s", config.model_type, error)
            reason = error
            continue
        if traits is None:
            raise UnsupportedModelError(
                f"{config.model_type}: tokens that are computed one at a time, beside another sequence, get other "
                "logits than transformers' generate gives them; the engine would give other tokens"
            )
        return traits
    assert reason is not None  # the last of the configurations is the model's own
    raise not_checked(config, reason) from reason


def _traits(config: PreTrainedConfig) -> TurnTraits | None:
    """What the architecture can do; None if it does not even run as `generate` runs it."""
    model = build_model(copy.deepcopy(config), torch.float32, None, where="self-check")
    with noise(model), torch.inference_mode():
        keeps, state = _state(model)
        check = _Check(model, state)
        traits = TurnTraits(keeps=keeps, module_state=state)
        chunks = keeps and check.runs(check.holds, traits, _CHUNKS)
        if not chunks and not check.holds(traits, (len(_PROMPT),)):
            return None
        crops = chunks and check.runs(check.crops, replace(traits, crops=True))
    return replace(traits, chunks=chunks, crops=crops)


def _state(model: PreTrainedModel) -> tuple[bool, tuple[tuple[str, str], ...]]:
    """Whether a call leaves anything in a cache that the next one needs, and the attributes of modules it changes."""
    before, cache = tensor_attributes(model), TurnCache()
    Turns(model, TurnTraits()).forward(_first(model, cache, _PROMPT))
    after = tensor_attributes(model)
    changed = [place for place, value in after.items() if before.get(place) is not value]
    for path, name in changed:
        setattr(model.get_submodule(path), name, before.get((path, name)))
    return cache.holds_state, tuple(changed)


def _first(model: PreTrainedModel, cache: TurnCache, token_ids: Sequence[int], *, seed: int = 0) -> TurnInput:
    """The first call of a sequence; with another `seed`, an encoder gets something else."""
    inputs = example_encoder_inputs(model, _OTHER_ENCODED if seed else _ENCODED, seed=seed)
    return TurnInput(cache, token_ids, 0, 1, inputs)


class _Check:
    """Compares turns of one model with its `generate`."""

    def __init__(self, model: PreTrainedModel, state: tuple[tuple[str, str], ...]) -> None:
        self._model = model
        inputs = example_encoder_inputs(model, _ENCODED)
        self._token_ids, self._expected = generated_logits(model, _PROMPT, _NUM_STEPS, inputs)
        initial = ModuleState(model, state)
        initial.exchange([None] * len(initial.initial))  # what `generate` has left there

    def runs(self, check: Callable[..., bool], *args: Any) -> bool:
        """The check's result; False if the model does not run so."""
        try:
            return check(*args)
        except Exception as error:
            logger.debug("%s does not hold: %s", check.__name__, error)
            return False

    def holds(self, traits: TurnTraits, prompt_chunks: Sequence[int]) -> bool:
        """Whether turns give the expected logits from the prompt's last token on, while another sequence runs too."""
        turns = Turns(self._model, traits)
        cache, other, logits = turns.new_cache(), turns.new_cache(), []
        past, other_past = 0, 0
        for num_new in (*prompt_chunks, *[1] * (len(self._token_ids) - len(_PROMPT))):
            end = past + num_new
            rows = turns.forward(self._turn(cache, self._token_ids[:end], past if traits.keeps else 0))
            past = end
            if past >= len(_PROMPT):
                logits.append(rows)
            other_end = min(other_past + (1 if other_past else 2), len(_OTHER_PROMPT))
            if other_end > other_past:
                turns.forward(self._turn(other, _OTHER_PROMPT[:other_end], other_past if traits.keeps else 0, seed=1))
                other_past = other_end
        return self._is_expected(logits)

    def crops(self, traits: TurnTraits) -> bool:
        """Whether drafted tokens can be removed after they were computed."""
        turns = Turns(self._model, traits)
        cache = turns.new_cache(drafts=True)
        logits = [turns.forward(_first(self._model, cache, _PROMPT))]
        for past in range(len(_PROMPT), len(self._token_ids)):
            if not cache.can_continue_from(past):
                return False
            drafted = [*self._token_ids[: past + 1], *_WRONG]
            logits.append(turns.forward(TurnInput(cache, drafted, past, 1 + len(_WRONG)))[:1])
        return self._is_expected(logits)

    def _turn(self, cache: TurnCache, token_ids: Sequence[int], past: int, *, seed: int = 0) -> TurnInput:
        return TurnInput(cache, token_ids, past, 1) if past else _first(self._model, cache, token_ids, seed=seed)

    def _is_expected(self, logits: Sequence[torch.Tensor]) -> bool:
        actual, expected = torch.cat(list(logits)), self._expected
        scale = max(float(expected.abs().max()), 1e-6)
        return actual.shape == expected.shape and float((actual - expected).abs().max()) / scale <= TOLERANCE
