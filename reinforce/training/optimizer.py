"""AdamW as open_clip sets it up, and the learning rate of every step."""

from __future__ import annotations

import math

import torch

from reinforce.training.config import Optimizer


def learning_rate(step: int, steps: int, config: Optimizer) -> float:
    """Of step ``step`` (from 0) of ``steps``: linear up to ``lr`` within ``warmup`` steps, cosine to ``final_lr``.

    The last step has ``final_lr``.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, steps - 1 - config.warmup)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def undecayed(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that have no weight decay.

    Gains, biases and logit scales (no more than one dimension is longer than 1), and what modules of open_clip and
    timm list themselves by ``no_weight_decay()``, such as positional embeddings.
    """
    names = {name for name, p in model.named_parameters() if p.numel() == max(p.shape, default=1)}
    for prefix, module in model.named_modules():
        if callable(listed := getattr(module, "no_weight_decay", None)):
            names |= {f"{prefix}.{name}" if prefix else name for name in listed()}
    return names


def adamw(model: torch.nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """The optimizer of all parameters that are learnt; fused into one kernel on CUDA."""
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    bare = undecayed(model)
    groups = [
        {"params": [p for name, p in learnt.items() if name not in bare], "weight_decay": config.weight_decay},
        {"params": [p for name, p in learnt.items() if name in bare], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.is_cuda for p in learnt.values()) or None,
    )
