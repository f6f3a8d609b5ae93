"""student.yaml: the training that was tuned, with what was found in place, ready for `reinforce train`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from reinforce.tuning.space import LAMBDA, Setting, with_setting

_BEFORE = "as in the config that was tuned"
_WIDTH = 110


def student_yaml(
    written: Mapping[str, Any], found: Mapping[str, float], origins: Mapping[str, str], output: str, said: str
) -> str:
    """The student's config as the user wrote it, but for its output, scales and lambda.

    ``found`` are values by teacher and LAMBDA, ``origins`` where each scale and lambda comes from, one line each, those
    of teachers that were not tuned among them. ``said`` is told at the top.
    """
    scales = {name: value for name, value in found.items() if name != LAMBDA}
    data = with_setting(written, Setting("", scales, found.get(LAMBDA)))
    data["output"] = output
    lines = _comment(said)
    for key, value in data.items():
        if key == "loss":
            lines += ["loss:", *_loss(value, origins)]
        else:
            lines += _yaml({key: value})
    return "\n".join(lines) + "\n"


def _loss(loss: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    lines = []
    for key, value in loss.items():
        if key == "logit_scales":
            for name, origin in origins.items():
                if name not in value and name != LAMBDA:
                    lines += _comment(f"{name}: {origin}")
            if value:
                lines.append("logit_scales:")
                for name, scale in value.items():
                    told = [*_comment(origins.get(name, _BEFORE)), *_yaml({name: scale})]
                    lines += [f"  {line}" for line in told]
        elif key == LAMBDA:
            lines += [*_comment(origins.get(LAMBDA, _BEFORE)), *_yaml({key: value})]
        else:
            lines += _yaml({key: value})
    return [f"  {line}" for line in lines]


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH)]


def _yaml(value: Mapping[str, Any]) -> list[str]:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=10_000).rstrip("\n").split("\n")
