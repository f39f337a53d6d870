"""An append-only file of JSON objects, one a line, synced."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from io import FileIO
from pathlib import Path
from typing import Any, Self


class LineFile:
    """Appends JSON objects to a file, from `__enter__` to `__exit__`, from any thread.

    Only the last line can be cut short by a crash; it is removed when the file is next opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._file = open(self.path, "a+b", buffering=0)
        try:
            self._begin(self._file)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self, file: FileIO) -> None:
        """Prepares the open file for the first `append`."""
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            file.truncate(whole)
            file.seek(whole)

    def append(self, *entries: dict[str, Any]) -> None:
        """Writes entries and waits until they are on disk."""
        assert self._file is not None, "the file is not open"
        text = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)
        line = memoryview(text.encode())
        with self._lock:
            before = self._file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
            except OSError:
                # A full disk may take part of a line. Truncating needs no space; if it fails, the tail is cut later.
                with contextlib.suppress(OSError):
                    self._file.truncate(before)
                raise
