"""What a zero-shot set's classes, templates and groups mean; data is looked up in them, never run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reinforce.errors import UserError
from reinforce.source.urls import canonical, filesystem

#: A class's name -> a text about it.
Template = Callable[[str], str]

TEMPLATE_SETS = ("openai", "simple", "none")
IMAGENET = "imagenet"
_PLACES = re.compile(r"\{c?\}")


def templates_of(templates: str | Sequence[str], where: str) -> list[Template]:
    """Templates as functions: open_clip's ``openai`` or ``simple``, ``none``, a text file, or own ones.

    ``{}`` and clip_benchmark's ``{c}`` are replaced by the class's name. Raises UserError.
    """
    if templates == "none":
        return [lambda name: name]
    if isinstance(templates, str) and templates in TEMPLATE_SETS:
        from open_clip import zero_shot_metadata

        return list(getattr(zero_shot_metadata, f"{templates.upper()}_IMAGENET_TEMPLATES"))
    if isinstance(templates, str):
        if not templates.endswith(".txt"):
            raise UserError(
                f"{where}: templates {templates!r} are unknown: use {', '.join(TEMPLATE_SETS)}, a .txt file with one "
                "template a line, or a list of them."
            )
        templates = _lines(templates, f"{where}: templates")
    if not templates:
        raise UserError(f"{where}: templates are an empty list: give one such as 'a photo of a {{}}.', or `none`.")
    for template in templates:
        if not _PLACES.search(template):
            raise UserError(f"{where}: template {template!r} has no {{}}: write it where the class's name belongs.")
    return [_template(template) for template in templates]


def _template(text: str) -> Template:
    # not str.format, which looks into objects and chokes on other braces
    return lambda name: _PLACES.sub(lambda _: name, text)


def class_names(classes: str | Sequence[str], where: str) -> list[str]:
    """Names in the order of labels: a list, ``imagenet``, or the lines of a text file. Raises UserError."""
    if classes == IMAGENET:
        return list(_imagenet().values())
    names = _lines(classes, f"{where}: classes") if isinstance(classes, str) else list(classes)
    if not names:
        raise UserError(f"{where}: classes are an empty list: name at least one.")
    return names


def names_of_folders(classes: str | Sequence[str] | None, folders: Sequence[str], where: str) -> list[str]:
    """A class's name for each of the sorted folders. Raises UserError where names and folders do not fit."""
    if classes is None:
        return list(folders)
    if classes == IMAGENET:
        imagenet = _imagenet()
        strange = [folder for folder in folders if folder not in imagenet]
        if strange:
            raise UserError(
                f"{where}: folder {strange[0]!r} is no class of ImageNet-1k, whose folders are named by WordNet ids "
                f"such as n01440764 ({len(strange)} of {len(folders)} folders are not): name the classes in a list "
                "or a text file."
            )
        return [imagenet[folder] for folder in folders]
    names = class_names(classes, where)
    if len(names) != len(folders):
        raise UserError(
            f"{where}: classes has {len(names)} names for {len(folders)} folders: give one name for each folder, "
            f"sorted, from {folders[0]!r} to {folders[-1]!r}."
        )
    return names


def groups_of(groups: str | Mapping[str, str], classes: Sequence[str], where: str) -> list[str]:
    """The group of each class by a mapping or a JSON file of one. Raises UserError for a class without a group."""
    if isinstance(groups, str):
        try:
            data: Any = json.loads(_read(groups, f"{where}: groups"))
        except ValueError as error:
            raise UserError(f"{where}: groups {groups} is not JSON ({error}): want {{class: group}}.") from error
        if not isinstance(data, dict) or not all(isinstance(group, str) for group in data.values()):
            raise UserError(f"{where}: groups {groups} must be a JSON object that maps classes to the names of groups.")
        groups = data
    missing = [name for name in classes if name not in groups]
    if missing:
        raise UserError(
            f"{where}: groups has no group for {len(missing)} of {len(classes)} classes, such as {missing[0]!r}: "
            "add them."
        )
    return [groups[name] for name in classes]


def _imagenet() -> dict[str, str]:
    """WordNet id -> open_clip's name of each class of ImageNet-1k, in the order of labels."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))


def _lines(url: str, where: str) -> list[str]:
    """The lines of a text file; an empty one in between would shift those after it."""
    lines = [line.strip() for line in _read(url, where).rstrip().splitlines()]
    if not lines:
        raise UserError(f"{where}: {canonical(url)} is empty: write one a line.")
    if "" in lines:
        raise UserError(f"{where}: line {lines.index('') + 1} of {canonical(url)} is empty: remove or fill it.")
    return lines


def _read(url: str, where: str) -> str:
    fs, path = filesystem(url)
    try:
        text: str = fs.cat_file(path).decode("utf-8-sig")
    except Exception as error:  # each driver has its own exceptions
        raise UserError(
            f"{where}: cannot read {canonical(url)} ({type(error).__name__}: {error}): give a UTF-8 text file."
        ) from error
    return text
