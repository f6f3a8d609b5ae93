"""Specs of models, by the keys of a config."""

from __future__ import annotations

from typing import Any

from teachers.registry import AnyCaptioner
from teachers.spec import CaptionerSpec


def captioner_spec(**values: Any) -> CaptionerSpec:
    """Validate the keys of a captioner. Raises pydantic's ValidationError, which is a ValueError."""
    return AnyCaptioner.model_validate(values)
