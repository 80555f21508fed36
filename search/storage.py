"""Where Optuna keeps a study: in memory, in a journal file, in a database, or behind a gRPC proxy."""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import optuna
from optuna.storages import BaseStorage

from ofa.errors import UserError

EXAMPLES = "journal:runs/study.journal, grpc://host:13000, sqlite:///study.db, postgresql+psycopg://user@host/name"

EXTRAS = {"grpc": '"ofa-nas[grpc]"', "google": '"ofa-nas[grpc]"', "psycopg": '"ofa-nas[postgresql]"'}


def open_storage(url: str | None) -> BaseStorage:
    """The storage of a URL; None is memory.  Raises UserError for what is no URL and for a missing driver."""
    if url is None:
        return optuna.storages.InMemoryStorage()
    scheme, _, rest = url.partition(":")
    try:
        if scheme == "journal":
            return _journal(Path(rest.removeprefix("//")))
        if scheme == "grpc":
            return _proxy(url)
        return optuna.storages.RDBStorage(url)
    except ImportError as error:  # Optuna's own has the driver's as its context
        name = error.name or getattr(error.__context__, "name", None)
        if name is None:
            raise UserError(f"storage {url} has a driver that does not load ({error}); install it anew") from None
        raise UserError(f"storage {url} needs the package {name}; pip install {EXTRAS.get(name, name)}") from None
    except Exception as error:  # of SQLAlchemy, a driver, gRPC or the file system; none of them is imported here
        line = str(error).splitlines()[0]
        raise UserError(f"storage {url} cannot be opened ({line}); write it like one of {EXAMPLES}") from None


@contextmanager
def opened(url: str) -> Iterator[BaseStorage]:
    """The storage of a URL, its connections closed at the end."""
    storage = open_storage(url)
    try:
        yield storage
    finally:
        inner = getattr(storage, "_backend", storage)  # a database comes inside a cache
        storage.remove_session()
        if isinstance(inner, optuna.storages.RDBStorage):
            inner.engine.dispose()


def _journal(path: Path) -> BaseStorage:
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(path), _Lock(path))  # type: ignore[arg-type]  # the class it names is private
    return optuna.storages.JournalStorage(backend)


class _Lock:
    """One process at a time writes a file; a killed one's lock goes at once, where Optuna's stays for 30 s."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def acquire(self) -> bool:
        self._file = os.open(self._path, os.O_RDWR)  # an exclusive lock on NFS needs it
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        os.close(self._file)


def _proxy(url: str) -> BaseStorage:
    from optuna.storages import GrpcStorageProxy

    where = urlsplit(url)
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        return GrpcStorageProxy(host=where.hostname or "localhost", port=where.port or 13000)
