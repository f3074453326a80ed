"""The cache for a reader: its entries and their state as records, one a line."""

from __future__ import annotations

import time
from typing import Any

from moe_fx.cache.store import Store
from moe_fx.errors import CacheError

__all__ = ["entries", "verdicts"]

_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


def entries(store: Store) -> list[dict[str, Any]]:
    """Every entry, the last used first: the start of its key, what it is, its size, its age and its last use."""
    rows = []
    now = time.time()
    for path in store.files():
        try:
            status, header = path.stat(), store.header(path)
        except FileNotFoundError:
            continue
        except CacheError as error:
            rows.append(_row(path.name[:12], "unusable", str(error), path.lstat().st_size, "", ""))
            continue
        about = header.about
        matched = ", ".join(f"{count} {kind}" for kind, count in about.get("matched", {}).items())
        what = " ".join(filter(None, (about.get("target"), about.get("downstream"), matched and f"({matched})")))
        ages = (_age(now - header.created), _age(now - status.st_mtime))
        rows.append(_row(path.name[:12], header.kind, what, status.st_size, *ages))
    return rows


def verdicts(store: Store) -> list[dict[str, Any]]:
    """Every entry with ``good``, or what is wrong with it. Damaged entries are replaced when they are next needed."""
    return [{"entry": path.name, "verdict": problem or "good"} for path, problem in store.verify()]


def _row(key: str, kind: str, what: str, size: int, made: str, used: str) -> dict[str, Any]:
    return {"key": key, "kind": kind, "what": what, "KiB": -(-size // 1024), "made": made, "used": used}


def _age(seconds: float) -> str:
    for unit, length in _UNITS:
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
