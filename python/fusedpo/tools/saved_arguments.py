"""Read the arguments of a run from training_args.bin without running anything that is in it.

The file is a pickle, and a pickle may call any function. Here every class and function that it
names becomes an inert record of its arguments, so a file from anybody is safe to read, neither TRL
nor transformers is needed, and a file of another version of theirs is read as well.
"""

from __future__ import annotations

import pathlib
import pickle
import zipfile
from typing import Any

FILE = "training_args.bin"


def read_arguments(path: pathlib.Path) -> tuple[str, dict[str, Any]]:
    """Return the class name (`DPOConfig`, ...) and the arguments in a training_args.bin.

    Arguments are strings, numbers, booleans, None, lists and dicts. Enumerations become their
    values. Other objects (devices, process states) are left out, and so are access tokens.

    Raises:
        ValueError: the file is not what transformers writes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(names[0]) as file:
                found = _Inert(file).load()
        kind, state = type(found).__name__, found.state
    except (OSError, zipfile.BadZipFile, IndexError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} must be a {FILE} of transformers: {error}") from error
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} must hold the arguments of a training: {error}") from error
    plain = {
        name: _plain(value)
        for name, value in state.items()
        if not name.startswith("_") and not name.endswith("hub_token")
    }
    return kind, {name: value for name, value in plain.items() if value is not _LEFT_OUT}


class _Record:
    """What stands for an object: what it would have been made from."""

    arguments: tuple[Any, ...]
    state: dict[str, Any]

    def __new__(cls, *arguments: Any) -> _Record:  # a pickle may go past __init__
        record = super().__new__(cls)
        record.arguments = arguments
        record.state = {}
        return record

    def __init__(self, *arguments: Any) -> None:
        """Takes what __new__ has kept."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.state = state


class _Inert(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Record,), {})

    def persistent_load(self, pid: Any) -> Any:
        return _Record()  # tensors


_LEFT_OUT = object()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return [item for item in items if item is not _LEFT_OUT]
    if isinstance(value, dict):
        pairs = {str(key): _plain(item) for key, item in value.items()}
        return {key: item for key, item in pairs.items() if item is not _LEFT_OUT}
    if isinstance(value, _Record) and not value.state and len(value.arguments) == 1:
        return _plain(value.arguments[0])  # an enumeration's member
    return _LEFT_OUT
