"""Class names, prompt templates and class groups of zero-shot sets; they are parsed as data, never executed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reinforce.errors import UserError
from reinforce.source.formats.folder import folders_of_one_class
from reinforce.source.urls import canonical, filesystem, storage_errors

#: Maps a class name to a text about the class.
Template = Callable[[str], str]

TEMPLATE_SETS = ("openai", "simple", "none")
IMAGENET = "imagenet"
_PLACEHOLDER = re.compile(r"\{c?\}")


def load_templates(templates: str | Sequence[str], where: str) -> list[Template]:
    """Return templates as functions: open_clip's ``openai`` or ``simple``, ``none``, a text file, or a custom list.

    ``{}`` and clip_benchmark's ``{c}`` are replaced by the class name. ``where`` names the set in messages. Raises
    UserError.
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
                "template per line, or a list of templates."
            )
        templates = _read_lines(templates, f"{where}: templates")
    if not templates:
        raise UserError(f"{where}: templates are an empty list: add one such as 'a photo of a {{}}.', or use `none`.")
    for template in templates:
        if not _PLACEHOLDER.search(template):
            raise UserError(f"{where}: template {template!r} has no {{}}: put it where the class name belongs.")
    return [_make_template(template) for template in templates]


def _make_template(text: str) -> Template:
    # not str.format, which looks up attributes and fails on other braces
    return lambda name: _PLACEHOLDER.sub(lambda _: name, text)


def load_class_names(classes: str | Sequence[str], where: str) -> list[str]:
    """Return class names in label order from a list, ``imagenet``, or the lines of a text file. Raises UserError."""
    if classes == IMAGENET:
        return list(_imagenet_names().values())
    names = _read_lines(classes, f"{where}: classes") if isinstance(classes, str) else list(classes)
    if not names:
        raise UserError(f"{where}: classes are an empty list: name at least one.")
    return names


def name_folders(classes: str | Sequence[str] | None, folders: Sequence[str], where: str) -> list[str]:
    """Return one class name per folder. ``folders`` are sorted.

    Raises UserError where names and folders disagree, and for two folders of one class.
    """
    if classes is None:
        if same := folders_of_one_class(folders):
            raise UserError(f"{where}: {same}.")
        return list(folders)
    if classes == IMAGENET:
        imagenet = _imagenet_names()
        unknown = [folder for folder in folders if folder not in imagenet]
        if unknown:
            raise UserError(
                f"{where}: folder {unknown[0]!r} is no class of ImageNet-1k, whose folders are named by WordNet ids "
                f"such as n01440764 ({len(unknown)} of {len(folders)} folders are not): name the classes in a list "
                "or a text file."
            )
        return [imagenet[folder] for folder in folders]
    names = load_class_names(classes, where)
    if len(names) != len(folders):
        raise UserError(
            f"{where}: classes has {len(names)} names for {len(folders)} folders: give one name for each folder, "
            f"sorted, from {folders[0]!r} to {folders[-1]!r}."
        )
    return names


def load_groups(groups: str | Mapping[str, str], classes: Sequence[str], where: str) -> list[str]:
    """Return the group of each class from a mapping or a JSON file. Raises UserError for a class without a group."""
    if isinstance(groups, str):
        try:
            data: Any = json.loads(_read_text(groups, f"{where}: groups"))
        except ValueError as error:
            raise UserError(f"{where}: groups {groups} is not JSON ({error}): want {{class: group}}.") from error
        if not isinstance(data, dict) or not all(isinstance(group, str) for group in data.values()):
            raise UserError(f"{where}: groups {groups} must be a JSON object that maps class names to group names.")
        groups = data
    missing = [name for name in classes if name not in groups]
    if missing:
        raise UserError(
            f"{where}: groups has no group for {len(missing)} of {len(classes)} classes, such as {missing[0]!r}: "
            "add them."
        )
    return [groups[name] for name in classes]


def _imagenet_names() -> dict[str, str]:
    """WordNet id -> open_clip's class name, for the classes of ImageNet-1k in label order."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))


def _read_lines(url: str, where: str) -> list[str]:
    """Read the lines of a text file; an empty line in between is an error, since it would shift the lines after it."""
    lines = [line.strip() for line in _read_text(url, where).rstrip().splitlines()]
    if not lines:
        raise UserError(f"{where}: {canonical(url)} is empty: write one entry per line.")
    if "" in lines:
        raise UserError(f"{where}: line {lines.index('') + 1} of {canonical(url)} is empty: remove or fill it.")
    return lines


def _read_text(url: str, where: str) -> str:
    fs, path = filesystem(url)
    with storage_errors(f"{where}: {canonical(url)} cannot be read", "Give a UTF-8 text file."):
        return bytes(fs.cat_file(path)).decode("utf-8-sig")
