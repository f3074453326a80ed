"""Cache entries on disk: written whole, readable by their owner alone, hashed, and bounded in size.

An entry is one file: a line with the format and the SHA-256 of all that follows, a line of JSON (the header), and the
body. Nothing in it is ever unpickled. The folder is
``<cache_dir>/v<FORMAT>``, made with mode 0700; entries have mode 0600 and are named for their key. A file's time of
modification is the time of its last use, which eviction goes by.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_fx.errors import CacheError

if TYPE_CHECKING:
    from moe_fx.options import Options

__all__ = ["FORMAT", "Header", "Store", "default_cache_dir", "key_of", "open_store"]

FORMAT = 1
"""Version of the entries' form; it grows with any change to it."""

_MAGIC = "moe-fx-cache"
_SUFFIX, _TEMPORARY = ".entry", ".tmp"
_HOMELESS = "this user has no home directory to keep a cache in; set cache_dir or MOE_FX_CACHE_DIR, or cache=False"
# Longer than any writer takes: a temporary file of this age was left by a process that died.
_STALE_SECONDS = 3600.0


def default_cache_dir() -> Path:
    """Where entries lie unless the user says otherwise: ``moe_fx`` under the user's cache directory."""
    import platformdirs

    try:
        return Path(platformdirs.user_cache_dir("moe_fx", appauthor=False))
    except RuntimeError as error:
        raise CacheError(_HOMELESS) from error


def open_store(options: Options, *, create: bool = True) -> Store:
    """The store that the options name; raises as :class:`Store` does."""
    return Store(options.cache_dir or default_cache_dir(), options.cache_max_mib << 20, create=create)


def key_of(kind: str, components: Mapping[str, str]) -> str:
    """The key of an entry: a hash over its kind and its named components."""
    return hashlib.sha256(json.dumps([FORMAT, kind, sorted(components.items())]).encode()).hexdigest()


@dataclass(frozen=True)
class Header:
    """What an entry says of itself.

    Attributes:
        kind: ``graph`` for a lowered graph, else the downstream compiler whose artifact it is.
        components: the digest of everything that the entry depends on, by name.
        variant: tells apart entries of one key that hold under different conditions on sizes.
        created: seconds since the epoch.
        about: a few words for listings (target, what was matched).
    """

    kind: str
    components: Mapping[str, str]
    variant: str = ""
    created: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """See :func:`key_of`."""
        return key_of(self.kind, self.components)

    @property
    def file_name(self) -> str:
        """Where the entry lies in its folder."""
        return f"{self.key}-{self.variant}{_SUFFIX}" if self.variant else f"{self.key}{_SUFFIX}"


class Store:
    """The entries of one cache directory.

    Its folder is opened once, checked as it is then, and all entries are reached through the open folder: whatever is
    put under its name later is never looked at.

    Args:
        cache_dir: made when missing, with the folder of this format inside.
        limit_bytes: total size that :meth:`write` keeps the entries under, by dropping the least recently used.
        create: False looks at a cache without making one.

    Raises:
        CacheError: the folder cannot be made, is someone else's, or others may write to it or put another in its place.
    """

    def __init__(self, cache_dir: str | Path, limit_bytes: int = 1 << 30, *, create: bool = True) -> None:
        try:
            self.folder = Path(cache_dir).expanduser() / f"v{FORMAT}"
        except RuntimeError as error:
            raise CacheError(_HOMELESS) from error
        self._limit = limit_bytes
        if create:
            try:
                self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    self.folder.mkdir(mode=0o700)
            except OSError as error:
                raise CacheError(
                    f"the cache directory {self.folder} cannot be made ({error.strerror}); "
                    "set cache_dir or MOE_FX_CACHE_DIR to a directory that you can write to, or cache=False"
                ) from error
        self._descriptor = _open_folder(self.folder) if create or self.folder.exists() else None
        if self._descriptor is not None:
            weakref.finalize(self, os.close, self._descriptor)

    def find(self, key: str) -> list[Path]:
        """Files of the entries with this key, of all variants; the last used comes first."""
        return [path for path in self.files() if path.name.startswith(key)]

    def files(self) -> list[Path]:
        """Files of all entries; the last used comes first."""
        return sorted(self._names(_SUFFIX), key=self._used, reverse=True)

    def read(self, path: Path) -> tuple[Header, bytes]:
        """One entry, checked.

        Raises:
            FileNotFoundError: it is gone, which eviction by another process can cause at any time.
            CacheError: it cannot be trusted or is damaged; the message says how.
        """
        with self._open_private(path) as file:
            digest = _parse_first_line(path, file.readline())
            content = file.read()
        if hashlib.sha256(content).hexdigest() != digest:
            raise CacheError(f"cache entry {path.name} is truncated or damaged: its contents do not have their hash")
        line, _, body = content.partition(b"\n")
        return _parse_header(path, line), body

    def header(self, path: Path) -> Header:
        """The header alone, for listings; the contents are not hashed. Raises as :meth:`read` does."""
        with self._open_private(path) as file:
            _parse_first_line(path, file.readline())
            return _parse_header(path, file.readline())

    def touch(self, path: Path) -> None:
        """Note that an entry was used just now."""
        with contextlib.suppress(OSError):
            os.utime(path.name, dir_fd=self._descriptor)

    def write(
        self,
        kind: str,
        components: Mapping[str, str],
        body: bytes,
        *,
        variant: str = "",
        about: Mapping[str, Any] | None = None,
    ) -> Path:
        """Put an entry in place of any other of its key and variant, then drop what exceeds the limit.

        Raises:
            CacheError: the disk does not take it.
        """
        header = Header(kind, dict(components), variant, time.time(), dict(about or {}))
        content = json.dumps(vars(header)).encode() + b"\n" + body
        first_line = f"{_MAGIC} {FORMAT} {hashlib.sha256(content).hexdigest()}\n".encode()
        path = self.folder / header.file_name
        try:
            self._replace(path, first_line + content)
        except OSError as error:
            raise CacheError(f"a cache entry cannot be written to {self.folder} ({error.strerror})") from error
        self.evict(keep=path)
        return path

    def evict(self, keep: Path | None = None) -> list[Path]:
        """Drop the least recently used entries beyond the limit (never ``keep``), and what dead writers left."""
        now, total, dropped = time.time(), 0, []
        # What cannot be dropped stays: there is room for an entry all the same, or writing it has said so.
        for path in self.files():
            with contextlib.suppress(OSError):
                size = self._status(path).st_size
                total += size
                if total > self._limit and path != keep:
                    self._unlink(path)
                    total -= size
                    dropped.append(path)
        for path in self._names(_TEMPORARY):
            with contextlib.suppress(OSError):
                if now - self._status(path).st_mtime > _STALE_SECONDS:
                    self._unlink(path)
        return dropped

    def clear(self) -> int:
        """Remove every entry that can be removed; returns how many."""
        removed = 0
        for path in [*self.files(), *self._names(_TEMPORARY)]:
            with contextlib.suppress(OSError):
                self._unlink(path)
                removed += path.suffix == _SUFFIX
        return removed

    def verify(self) -> Iterator[tuple[Path, str]]:
        """Read every entry; yields its file and what is wrong with it, or ""."""
        for path in self.files():
            try:
                self.read(path)
            except FileNotFoundError:
                continue
            except CacheError as error:
                yield path, str(error)
            else:
                yield path, ""

    def _replace(self, path: Path, content: bytes) -> None:
        """Write a file whole: nobody sees it under its name before it is complete."""
        flags, temporary = os.O_WRONLY | os.O_CREAT | os.O_EXCL, f"{secrets.token_hex(8)}{_TEMPORARY}"
        descriptor = os.open(temporary, flags, 0o600, dir_fd=self._descriptor)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(temporary, path.name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._descriptor)
            raise

    # Everything below takes names in the open folder, and no path.

    def _names(self, suffix: str) -> list[Path]:
        names = [] if self._descriptor is None else os.listdir(self._descriptor)
        return [self.folder / name for name in names if name.endswith(suffix)]

    def _status(self, path: Path) -> os.stat_result:
        return os.stat(path.name, dir_fd=self._descriptor, follow_symlinks=False)

    def _unlink(self, path: Path) -> None:
        os.unlink(path.name, dir_fd=self._descriptor)

    def _used(self, path: Path) -> float:
        try:
            return self._status(path).st_mtime
        except OSError:
            return 0.0

    def _open_private(self, path: Path) -> Any:
        """The open file, when it is an ordinary one of this user and closed to others."""
        if self._descriptor is None:
            raise FileNotFoundError(path)
        try:
            descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._descriptor)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise CacheError(f"cache entry {path.name} cannot be read ({error.strerror})") from error
        # The open file is asked, not its name: the name may lead elsewhere by now.
        status = os.fstat(descriptor)
        wrong = ""
        if not stat.S_ISREG(status.st_mode):
            wrong = "is no ordinary file"
        elif status.st_uid != os.geteuid():
            wrong = f"belongs to user {status.st_uid}, not to you"
        elif status.st_mode & 0o077:
            wrong = f"is open to others (mode {status.st_mode & 0o777:o}, not 600)"
        if wrong:
            os.close(descriptor)
            raise CacheError(f"cache entry {path.name} {wrong}, and is not trusted")
        return os.fdopen(descriptor, "rb")


def _open_folder(folder: Path) -> int:
    """A descriptor of the folder, which is this user's and closed to writes of others, as is the one around it."""
    try:
        around = os.stat(folder.parent)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except NotADirectoryError as error:
        raise CacheError(f"the cache directory {folder} is no directory; set cache_dir to another") from error
    except OSError as error:
        raise CacheError(f"the cache directory {folder} cannot be read ({error.strerror})") from error
    try:
        _check_folder(folder, os.fstat(descriptor), around)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_folder(folder: Path, status: os.stat_result, around: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise CacheError(
            f"the cache directory {folder} belongs to user {status.st_uid}, who could change its entries; "
            "set cache_dir or MOE_FX_CACHE_DIR to a directory of your own"
        )
    if status.st_mode & 0o022:
        raise CacheError(
            f"others may write to the cache directory {folder} (mode {status.st_mode & 0o777:o}); "
            f"run: chmod 700 {folder}"
        )
    # In one with the sticky bit (/tmp) others may add entries, but not take this folder away.
    if around.st_mode & 0o022 and not around.st_mode & stat.S_ISVTX:
        raise CacheError(
            f"others may put another directory in the place of {folder} (mode {around.st_mode & 0o777:o} of the one "
            f"around it); run: chmod go-w {folder.parent}"
        )


def _parse_first_line(path: Path, line: bytes) -> str:
    """The digest of what follows."""
    try:
        magic, version, digest = line.decode("ascii").split()
    except ValueError:
        magic = version = digest = ""
    if magic != _MAGIC or not line.endswith(b"\n"):
        raise CacheError(f"cache entry {path.name} is truncated or damaged: it does not begin as an entry does")
    if version != str(FORMAT):
        raise CacheError(f"cache entry {path.name} has format {version}; this moe-fx reads format {FORMAT}")
    return digest


def _parse_header(path: Path, line: bytes) -> Header:
    try:
        header = Header(**json.loads(line))
        file_name = header.file_name
    except (ValueError, TypeError, AttributeError) as error:
        raise CacheError(f"cache entry {path.name} is truncated or damaged: it has no readable header") from error
    if path.name != file_name:
        raise CacheError(f"cache entry {path.name} was made for something else: its header has another key")
    return header
