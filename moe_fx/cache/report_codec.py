"""A graph's report as JSON, and back: a warm start tells what was matched as the cold one did."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_fx.cache.errors import Uncacheable
from moe_fx.cache.graph_codec import decode_value, encode_value
from moe_fx.passes.core import Level, Site
from moe_fx.pipeline import GraphReport

__all__ = ["decode_into", "encode"]

_COUNTS = ("nodes_before", "nodes_after", "has_matmul")


def encode(report: GraphReport) -> dict[str, Any]:
    """The report without the graph and what belongs to one compilation (its id and times)."""
    counts = {name: getattr(report, name) for name in _COUNTS}
    return {**counts, "passes": list(report.pass_seconds), "sites": [_encode_site(site) for site in report.sites]}


def decode_into(report: GraphReport, data: Mapping[str, Any]) -> None:
    """Fill in a report from what :func:`encode` wrote. The passes are listed, and took no time."""
    for name in _COUNTS:
        setattr(report, name, data[name])
    report.pass_seconds = dict.fromkeys(data["passes"], 0.0)
    report.sites = [_decode_site(site) for site in data["sites"]]


def _encode_site(site: Site) -> dict[str, Any]:
    fields = {f.name: getattr(site, f.name) for f in dataclasses.fields(site)}
    fields["level"] = site.level.value if site.level else None
    fields["replaced"] = list(site.replaced)
    fields["attributes"] = {name: _attribute(given) for name, given in site.attributes.items()}
    return fields


def _attribute(given: Any) -> Any:
    try:
        return encode_value(given)
    except Uncacheable:
        return str(given)


def _decode_site(data: Mapping[str, Any]) -> Site:
    fields = dict(data)
    fields["level"] = Level(fields["level"]) if fields["level"] else None
    fields["replaced"] = tuple(fields["replaced"])
    fields["attributes"] = {name: decode_value(given, {}) for name, given in fields["attributes"].items()}
    return Site(**fields)
