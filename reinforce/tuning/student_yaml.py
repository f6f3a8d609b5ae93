"""student.yaml: the tuned student's config with the best values, ready for `reinforce train`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from reinforce.tuning.space import LAMBDA, Setting, apply_setting

_UNCHANGED = "unchanged from the tuned config"
_WIDTH = 110


def render_student_yaml(
    raw: Mapping[str, Any], best: Mapping[str, float], origins: Mapping[str, str], output: str, header: str
) -> str:
    """Return the student's config as the user wrote it, with other output, scales and lambda.

    ``best`` are values by teacher and LAMBDA. ``origins`` states in one line where each scale and lambda comes from,
    also for teachers that were not tuned. ``header`` is a comment at the top.
    """
    scales = {name: value for name, value in best.items() if name != LAMBDA}
    data = apply_setting(raw, Setting("", scales, best.get(LAMBDA)))
    data["output"] = output
    lines = _comment(header)
    for key, value in data.items():
        if key == "loss":
            lines += ["loss:", *_loss_lines(value, origins)]
        else:
            lines += _yaml_lines({key: value})
    return "\n".join(lines) + "\n"


def _loss_lines(loss: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    lines = []
    for key, value in loss.items():
        if key == "logit_scales":
            for name, origin in origins.items():
                if name not in value and name != LAMBDA:
                    lines += _comment(f"{name}: {origin}")
            if value:
                lines.append("logit_scales:")
                for name, scale in value.items():
                    entry = [*_comment(origins.get(name, _UNCHANGED)), *_yaml_lines({name: scale})]
                    lines += [f"  {line}" for line in entry]
        elif key == LAMBDA:
            lines += [*_comment(origins.get(LAMBDA, _UNCHANGED)), *_yaml_lines({key: value})]
        else:
            lines += _yaml_lines({key: value})
    return [f"  {line}" for line in lines]


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH)]


def _yaml_lines(value: Mapping[str, Any]) -> list[str]:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=10_000).rstrip("\n").split("\n")
