"""Routes of mixtures of experts: of a small model that is trained for it, and drawn at random with a Zipf-like skew."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

_VOCAB_SIZE = 1024
_NUM_EXPERTS, _NUM_CHOSEN, _NUM_LAYERS = 32, 4, 6
_BATCH, _LENGTH = 8, 128  # sequences of a training step, and their tokens
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 20
_HELD_OUT = 0.2  # of the text, from its end
_AHEAD_EXTRA = (0, 2)  # more guesses than there are choices


@dataclass(frozen=True)
class Routes:
    """The experts that sessions' tokens are routed to.

    Attributes:
        chosen: [sessions, tokens, layers, k], int64.
        num_experts: Of each layer.
        name: What they are of.
    """

    chosen: torch.Tensor
    num_experts: int
    name: str

    def union(self, first: int, num_sessions: int, token: int, layer: int) -> list[int]:
        """The experts of a layer that some sessions' tokens need together, in ascending order."""
        experts: list[int] = self.chosen[first : first + num_sessions, token, layer].unique().tolist()
        return experts


@dataclass(frozen=True)
class Guesses:
    """What the router of the next layer says of the hidden states of a layer.

    Attributes:
        chosen: [sessions, tokens, layers - 1, k + the most extra], the most likely first. Of layer `i + 1`.
        recall: The share of the choices that are among the guesses: with k guesses, and with more.
    """

    chosen: torch.Tensor
    recall: dict[int, float]


def zipf_routes(exponent: float, num_sessions: int, num_tokens: int, topic_tokens: int | None = None) -> Routes:
    """Choices of 8 of 128 experts in 4 layers, independent of those of the token before.

    Args:
        topic_tokens: After so many tokens, other experts are popular; None: never.
    """
    generator = torch.Generator().manual_seed(0)
    num_layers, num_experts, num_chosen = 4, 128, 8
    topic_tokens = topic_tokens or num_tokens
    name = f"drawn, 8 of 128 experts, Zipf's exponent {exponent:g}"
    if topic_tokens < num_tokens:
        name += f", other experts popular every {topic_tokens} tokens"
    topics = []
    for start in range(0, num_tokens, topic_tokens):
        ranks = torch.stack([1 + torch.randperm(num_experts, generator=generator) for _ in range(num_layers)])
        topics.append(ranks.expand(min(topic_tokens, num_tokens - start), -1, -1))
    uniform = torch.rand((num_sessions, num_tokens, num_layers, num_experts), generator=generator)
    # The largest of these sums are draws without replacement, with probabilities of rank ** -exponent.
    scores = -exponent * torch.cat(topics).float().log() - (-uniform.log()).log()
    return Routes(scores.topk(num_chosen).indices, num_experts, name)


# --- a small mixture ---


def trained_mixture(text: str, seconds: float) -> tuple[Qwen3MoeForCausalLM, torch.Tensor]:
    """Trains a mixture of 20 million weights on all but the end of a text. Returns it, and the tokens of the end."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # steps are small, and threads that wait for each other take longer on a busy machine
    tokens = _tokens(text)
    num_training = int(len(tokens) * (1 - _HELD_OUT))
    training, held_out = tokens[:num_training], tokens[num_training:]
    config = Qwen3MoeConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=_NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=_NUM_EXPERTS,
        num_experts_per_tok=_NUM_CHOSEN,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.1)
    started, step = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        rate = min((step + 1) / _WARMUP_STEPS, 0.1 + 0.9 * (1 + math.cos(math.pi * passed / seconds)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * rate
        starts = torch.randint(len(training) - _LENGTH, (_BATCH,))
        batch = torch.stack([training[start : start + _LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"  step {step} after {passed:.0f} s: loss {loss.item():.2f}", flush=True)
    return model.eval(), held_out


def _tokens(text: str) -> torch.Tensor:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return torch.tensor(tokenizer.encode(text).ids)


@torch.inference_mode()
def recorded_routes(
    model: Qwen3MoeForCausalLM, tokens: torch.Tensor, num_sessions: int, num_tokens: int
) -> tuple[Routes, Guesses, float]:
    """The routes of sessions that generate parts of a text, guesses of them, and the loss."""
    starts = [idx * (len(tokens) - num_tokens) // num_sessions for idx in range(num_sessions)]
    input_ids = torch.stack([tokens[start : start + num_tokens] for start in starts])
    residuals: list[torch.Tensor] = []  # of each layer, [sessions, tokens, hidden]
    layers = list(model.model.layers)
    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: residuals.append(inputs[0]))
        for layer in layers
    ]
    loss = model(input_ids=input_ids, labels=input_ids, output_router_logits=False).loss.item()
    for hook in hooks:
        hook.remove()
    chosen = torch.stack(
        [_scores(layer, x).topk(_NUM_CHOSEN).indices for layer, x in zip(layers, residuals, strict=True)]
    )
    most = _NUM_CHOSEN + max(_AHEAD_EXTRA)
    guessed = torch.stack(
        [_scores(after, x).topk(most).indices for after, x in zip(layers[1:], residuals[:-1], strict=True)]
    )
    recall = {
        extra: (chosen[1:, ..., None] == guessed[..., None, : _NUM_CHOSEN + extra]).any(-1).float().mean().item()
        for extra in _AHEAD_EXTRA
    }
    name = f"trained, {_NUM_CHOSEN} of {_NUM_EXPERTS} experts"
    return Routes(chosen.movedim(0, 2), _NUM_EXPERTS, name), Guesses(guessed.movedim(0, 2), recall), loss


def _scores(layer: nn.Module, residual: torch.Tensor) -> torch.Tensor:
    """What a layer's router says of a residual stream: [sessions, tokens, experts]."""
    states: torch.Tensor = layer.post_attention_layernorm(residual)  # type: ignore[operator]
    logits: torch.Tensor = layer.mlp.gate(states)[0]  # type: ignore[union-attr, operator]
    return logits.view(*residual.shape[:-1], -1)


def own_text(repository: Path) -> str:
    """Text that the repository has: its documents."""
    files = [repository / "README.md", *sorted((repository / "docs").rglob("*.md"))]
    return "\n".join(file.read_text() for file in files)
