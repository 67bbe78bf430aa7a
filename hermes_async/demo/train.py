"""Train the demo model: ``python -m hermes_async.demo.train TEXT``.

TEXT is one plain-text file of plays, speeches separated by blank lines. The last tenth is held out: neither
the tokenizer nor the weights are fitted to it, but it picks the epoch that is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hermes_async.demo import MODEL_PATH

END_OF_TEXT = "<|endoftext|>"
# The trainer numbers special tokens first.
END_OF_TEXT_ID = 0
HELD_OUT_SHARE = 0.1
SHORT_WINDOW = 256
LONG_WINDOW = 1024
LONG_SHARE = 0.25
OPENING_SHARE = 0.125
BATCH_TOKENS = 2048

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'First Citizen:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'MENENIUS:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ raise_exception('Unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'MENENIUS:\\n' }}{% endif %}"
)


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE tokenizer that can encode any text but adds no special token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=LONG_WINDOW,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(vocab_size: int) -> LlamaForCausalLM:
    """Create the untrained model: deep and narrow, so that it has many layers in a few megabytes."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=LONG_WINDOW,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Encode a text, however long, as one row of token ids."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def add_dropout(model: LlamaForCausalLM, p: float) -> list[RemovableHandle]:
    """Drop from the embedding and from every residual branch.

    ``LlamaConfig`` only offers dropout on attention weights, too little for a text this short. Hooks leave
    the architecture that is saved a plain Llama.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (nn.functional.dropout(output[0], p, module.training), *output[1:])
        return nn.functional.dropout(output, p, module.training)

    branches = [branch for layer in model.model.layers for branch in (layer.self_attn, layer.mlp)]
    return [module.register_forward_hook(hook) for module in (model.model.embed_tokens, *branches)]


def batches(ids: Tensor, openings: Tensor) -> Iterator[Tensor]:
    """Yield one epoch of shuffled batches, cut at a new offset every time.

    Most windows are short, for speed; some are long, so that every position up to the maximum is trained.
    Some start with the end-of-text token and the opening of a speech, so that the model can write from
    nothing.
    """
    offset = int(torch.randint(LONG_WINDOW, ()))
    windows: dict[int, list[Tensor]] = {SHORT_WINDOW: [], LONG_WINDOW: []}
    for block in torch.split(ids[offset:], LONG_WINDOW):
        size = LONG_WINDOW if torch.rand(()) < LONG_SHARE else SHORT_WINDOW
        windows[size] += [window for window in torch.split(block, size) if len(window) == size]
    result: list[Tensor] = []
    for size, found in windows.items():
        if not found:
            continue
        rows = torch.stack(found)[torch.randperm(len(found))]
        for row in (torch.rand(len(rows)) < OPENING_SHARE).nonzero().flatten():
            start = openings[torch.randint(len(openings), ())]
            opening = ids[start : start + size - 1]
            if len(opening) == size - 1:
                rows[row] = torch.cat([torch.tensor([END_OF_TEXT_ID]), opening])
        result += torch.split(rows, BATCH_TOKENS // size)
    for index in torch.randperm(len(result)):
        yield result[index]


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, ids: Tensor, window: int) -> float:
    """Return the mean loss in nats per token, every token but the first being predicted exactly once."""
    model.train(False)
    total = 0.0
    for start in range(0, len(ids) - 1, window - 1):
        rows = ids[start : start + window][None]
        total += model(input_ids=rows, labels=rows).loss.item() * (rows.shape[1] - 1)
    return total / (len(ids) - 1)


def schedule(steps: int) -> Callable[[int], float]:
    """Return the learning-rate factor: a linear warmup over 5 % of the steps, then a cosine down to 2 %."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def train(model: LlamaForCausalLM, ids: Tensor, held_out: Tensor, openings: Tensor, args: argparse.Namespace) -> int:
    """Train in place, leave the weights of the best epoch in the model, and return that epoch."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    gains = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(args.epochs * len(ids) // BATCH_TOKENS))
    handles = add_dropout(model, args.dropout)
    best, best_epoch, best_state = math.inf, 0, {}
    started = time.monotonic()
    for epoch in range(1, args.epochs + 1):
        model.train()
        losses = []
        for rows in batches(ids, openings):
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        held_out_loss = evaluate(model, held_out, SHORT_WINDOW)
        mean, minutes = sum(losses) / len(losses), (time.monotonic() - started) / 60
        print(f"epoch {epoch}: {mean:.3f} train, {held_out_loss:.3f} held out, {minutes:.1f} min", flush=True)
        if held_out_loss < best:
            best, best_epoch = held_out_loss, epoch
            best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for handle in handles:
        handle.remove()
    model.load_state_dict(best_state)
    return best_epoch


def main() -> None:
    """Train, save, and measure what was saved."""
    parser = argparse.ArgumentParser(description="Train the demo model on a text of plays.")
    parser.add_argument("text", type=Path, help="the text to train on, UTF-8")
    parser.add_argument("--output", type=Path, default=MODEL_PATH, help="the folder to write (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the text (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="at its peak (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.15, help="default: %(default)s")
    parser.add_argument("--vocab-size", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    text = args.text.read_text(encoding="utf-8")
    split = int(len(text) * (1 - HELD_OUT_SHARE))
    tokenizer = train_tokenizer(text[:split], args.vocab_size)
    ids, held_out = encode(tokenizer, text[:split]), encode(tokenizer, text[split:])
    newlines = torch.eq(ids, encode(tokenizer, "\n"))
    openings = (newlines[:-2] & newlines[1:-1]).nonzero().flatten() + 2
    model = build_model(len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {len(ids):,} tokens, {len(held_out):,} held out", flush=True)
    best_epoch = train(model, ids, held_out, openings, args)

    model.bfloat16().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output, save_jinja_files=False)

    # The weights on disk are rounded to bfloat16, but computing in float32 gives the same figures on any
    # processor.
    shipped = LlamaForCausalLM.from_pretrained(args.output, local_files_only=True, dtype=torch.float32)
    scored_characters = len(tokenizer.decode(held_out[1:]))
    report: dict[str, Any] = {
        "parameters": shipped.num_parameters(),
        "training_tokens": len(ids),
        "held_out_tokens": len(held_out),
        "epochs": args.epochs,
        "best_epoch": best_epoch,
        "learning_rate": args.learning_rate,
        "dropout": args.dropout,
        "seed": args.seed,
        "held_out": {},
    }
    for window in (SHORT_WINDOW, LONG_WINDOW):
        nats = evaluate(shipped, held_out, window)
        bits = nats * (len(held_out) - 1) / math.log(2) / scored_characters
        report["held_out"][f"window_{window}"] = {
            "nats_per_token": round(nats, 4),
            "bits_per_character": round(bits, 4),
        }
    (args.output / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
