"""Reference of the Python API, from signatures and docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import reinforce
from reinforce import errors
from reinforce.api.examples import ExampleStream
from reinforce.dataset.sample import Samples
from reinforce.dataset.torch_dataset import TorchSamples
from teachers import protocols

#: Title -> objects, in the order of the page.
OBJECTS: dict[str, list[Any]] = {
    "reinforce": [
        getattr(reinforce, name)
        for name in (
            *("init", "plan", "check", "run", "train", "evaluate", "adapt"),
            *("select", "inspect", "open", "load_config"),
        )
    ],
    "Reading": [reinforce.Dataset, reinforce.Sample, Samples, TorchSamples],
    "Training": [reinforce.Examples, ExampleStream, reinforce.Student],
    "Losses": [getattr(reinforce.losses, name) for name in reinforce.losses.__all__],
    "Models of your own": [
        value for value in vars(protocols).values() if inspect.isclass(value) and value.__module__ == protocols.__name__
    ],
    "Errors": [
        value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.UserError)
    ],
}


def api_page() -> str:
    """The page of the public names with their signatures and docstrings."""
    parts = [
        "# Python\n",
        "What `import reinforce` offers, and the protocols of models in `teachers.protocols`. Other modules may change "
        "between versions.\n",
    ]
    for title, objects in OBJECTS.items():
        parts.append(f"## {title}\n")
        for value in objects:
            parts += _entry(value.__qualname__, value, "###")
            if inspect.isclass(value):
                parts += [text for name, member in members(value) for text in _member(value, name, member)]
    return "\n".join(parts)


def members(class_: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class defines itself, with docstrings."""
    for name, member in vars(class_).items():
        value = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(member, property)) and value.__doc__:
            yield name, member


def _member(class_: type, name: str, member: Any) -> list[str]:
    if isinstance(member, property):
        return [f"#### {class_.__name__}.{name}\n", docstring(member.fget)]
    return _entry(f"{class_.__name__}.{name}", getattr(member, "__func__", member), "####")


def _entry(name: str, value: Any, level: str) -> list[str]:
    parts = [f"{level} {name}\n"]
    if inspect.isfunction(value):
        parts.append(f"```python\n{name.rpartition('.')[2]}{signature(value)}\n```\n")
    return [*parts, docstring(value)]


def signature(function: Callable[..., Any]) -> str:
    """The signature of a function, one parameter a line if it is long. Annotations are as in the source."""
    text = str(inspect.signature(function)).replace("'", "")
    if len(text) < 90:
        return text
    found = inspect.signature(function)
    lines = ",\n".join(f"    {parameter!s}" for parameter in found.parameters.values()).replace("'", "")
    result = "" if found.return_annotation is inspect.Signature.empty else f" -> {found.return_annotation}"
    return f"(\n{lines},\n){result}".replace("'", "")


def docstring(value: Any) -> str:
    """The docstring as Markdown. Literal blocks and doctests become code."""
    text = (inspect.getdoc(value) or "").replace("``", "`")
    text = re.sub(r"::\n\n((?:    .*\n?|\n)+)", r":\n\n\1", text)
    return text + "\n"
