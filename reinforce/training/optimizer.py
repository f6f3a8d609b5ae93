"""AdamW, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from reinforce.errors import UserError
from reinforce.training.config import Optimizer, cooldown_start


def learning_rate(step: int, steps: int, config: Optimizer, tower: str | None = None) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``: a linear warm-up, ``lr``, then a decay to ``final_lr``.

    With w = ``warmup_of(steps)``, n = ``steps``, and h = w + ``hold``, or with ``cooldown`` the step before the last
    ``cooldown`` * n:

        lr * (step + 1) / w                                      for step < w
        lr                                                       for step < h
        final_lr + (lr - final_lr) * f((step - h) / (n - 1 - h)) otherwise

    where f(x) is (1 + cos(pi x)) / 2, or 1 - x for ``decay: linear``. The last step has ``final_lr``, unless it is
    held. ``lr`` is that of the ``tower``, if it has one of its own.
    """
    peak = config.lr if tower is None or config.towers is None else config.towers.get(tower, config.lr)
    warmup = config.warmup_of(steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    start = warmup + (config.hold or 0) if config.cooldown is None else cooldown_start(steps, config.cooldown)
    done = min(1.0, max(0, step - start) / max(1, steps - 1 - start))
    left = 1 - done if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.final_lr + (peak - config.final_lr) * left


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
    """AdamW over all parameters that require gradients; fused into one kernel on CUDA.

    Groups have the ``tower`` for ``learning_rate``, and the ``scale`` of its result. Raises UserError for towers that
    the model does not have.
    """
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    undecayed = undecayed_parameters(model)
    towers, scales = _towers(model, "towers", config.towers, learnt), _scales(model, config, learnt)
    groups = []
    for tower in (None, *(config.towers or ())):
        own = {name: p for name, p in learnt.items() if towers.get(name) == tower}
        for scale in sorted({1.0, *(scales.get(name, 1.0) for name in own)}, reverse=True):
            for free, decay in ((False, config.weight_decay), (True, 0.0)):
                parameters = [
                    p for name, p in own.items() if (name in undecayed) == free and scales.get(name, 1.0) == scale
                ]
                groups.append({"params": parameters, "weight_decay": decay, "tower": tower, "scale": scale})
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.is_cuda for p in learnt.values()) or None,
    )


def _scales(model: Any, config: Optimizer, learnt: Iterable[str]) -> dict[str, float]:
    """Factors of learning rates by parameter: with decay d, d^n for one with n blocks between it and the head."""
    decays = config.layer_decay
    towers = _towers(model, "layer_decay", decays, learnt)
    if not decays:
        return {}
    depths = model.depths()
    for tower in decays:
        if not any(depths[name] for name in towers if towers[name] == tower):
            raise UserError(f"train.optimizer.layer_decay: the blocks of this {tower} tower are not known; remove it.")
    return {name: decays[tower] ** depths[name] for name, tower in towers.items()}


def _towers(model: Any, key: str, stated: Mapping[str, float] | None, learnt: Iterable[str]) -> dict[str, str]:
    """The tower of each parameter whose tower is ``stated`` under a key."""
    if not stated:
        return {}
    tower_of = getattr(model, "tower_of", None)
    if tower_of is None:
        raise UserError(f"train.optimizer.{key} is for students: remove it, and set train.optimizer.lr.")
    towers = {name: tower for name in learnt if (tower := tower_of(name)) in stated}
    if missing := sorted({*stated} - {*towers.values()}):
        raise UserError(
            f"train.optimizer.{key}: no weights of {', '.join(missing)} are learnt; name image or text, if it is not "
            "under student.freeze."
        )
    return towers
