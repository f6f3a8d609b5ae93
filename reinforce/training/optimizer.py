"""AdamW, and the learning rate of every step."""

from __future__ import annotations

import math

import torch

from reinforce.training.config import Optimizer


def learning_rate(step: int, steps: int, config: Optimizer) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``: linear warm-up to ``lr``, then a cosine to ``final_lr``.

    With w = ``warmup``, h = w + ``hold`` and n = ``steps``:

        lr * (step + 1) / w                                                          for step < w
        lr                                                                           for step < h
        final_lr + (lr - final_lr) / 2 * (1 + cos(pi * (step - h) / (n - 1 - h)))    otherwise

    The last step has ``final_lr``, unless it is held.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    start = config.warmup + (config.hold or 0)
    done = max(0, step - start) / max(1, steps - 1 - start)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def undecayed_parameters(model: torch.nn.Module) -> set[str]:
    """Names of the parameters without weight decay.

    These are gains, biases and logit scales (at most one dimension is longer than 1), and what modules of open_clip
    and timm list in ``no_weight_decay()``, such as positional embeddings.
    """
    names = {name for name, p in model.named_parameters() if p.numel() == max(p.shape, default=1)}
    for prefix, module in model.named_modules():
        if callable(listed := getattr(module, "no_weight_decay", None)):
            names |= {f"{prefix}.{name}" if prefix else name for name in listed()}
    return names


def make_adamw(model: torch.nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW over all parameters that require gradients; fused into one kernel on CUDA."""
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    undecayed = undecayed_parameters(model)
    groups = [
        {"params": [p for name, p in learnt.items() if name not in undecayed], "weight_decay": config.weight_decay},
        {"params": [p for name, p in learnt.items() if name in undecayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.is_cuda for p in learnt.values()) or None,
    )
