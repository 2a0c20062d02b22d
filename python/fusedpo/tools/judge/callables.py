"""A Python function as a judge: found by its name, and told apart from another by its source."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from typing import Any

# (prompt, first answer, second answer) -> a reply, read like that of a server: "A", "B", "tie", ...
JudgeFunction = Callable[[str, str, str], str]


def load_function(name: str) -> JudgeFunction:
    """Return the function that `module:function` names; modules of the working directory count.

    Raises:
        ValueError: the name has another form.
        ImportError: there is no such module, or it has no such function.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(
            f"a judge must be named module:function, or be an http:// or https:// address; "
            f"got {name!r}."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a command's path begins with where it is installed
    module = importlib.import_module(module_name)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ImportError(
            f"module {module_name} ({module.__file__}) has no function {attribute!r}."
        )
    return function  # type: ignore[no-any-return]


def function_identity(function: JudgeFunction) -> dict[str, Any]:
    """What tells a judging function from another, JSON-able: its name and a digest of its source.

    Raises:
        TypeError: it is no function, a lambda, or one with a closure, with default arguments or
            without source: then two that differ cannot be told apart, and the replies of one would
            be taken for those of the other.
    """
    name = getattr(function, "__qualname__", repr(function))
    if (
        not inspect.isfunction(function)
        or function.__closure__
        # A default may be any value, and the source of a lambda is all lines that it stands on.
        or function.__defaults__
        or function.__kwdefaults__
        or function.__name__ == "<lambda>"
    ):
        raise TypeError(
            "replies can be kept only for a plain function without a closure or default arguments; "
            f"got {name}. Define the judge with def in a module, or use no cache."
        )
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError) as error:
        raise TypeError(
            f"replies can be kept only for a function whose source is in a file; {name} has none. "
            "Put it in a module, or use no cache."
        ) from error
    digest = hashlib.sha256(textwrap.dedent(source).encode()).hexdigest()
    return {"function": f"{function.__module__}:{name}", "source": digest}


def call(function: JudgeFunction, prompt: str, first: str, second: str) -> str:
    """Ask a function.

    Raises:
        TypeError: it returned something else than a text.
    """
    reply = function(prompt, first, second)
    if not isinstance(reply, str):
        raise TypeError(
            f'a judge must return a text, such as "A", "B" or "tie"; '
            f"{getattr(function, '__qualname__', function)} returned {reply!r}."
        )
    return reply
