"""What moe_fx._C tells about the host, and the parsing behind it."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fx import _C

X86_SETS = {
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
}
ARM_SETS = {"neon", "asimddp", "i8mm", "bf16", "sve"}

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="compares with what Linux tells")


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0", [0]),
        ("0-3,8,10-11", [0, 1, 2, 3, 8, 10, 11]),
        ("5-5", [5]),
        ("8,0-1", [0, 1, 8]),
        ("0-2,1-3", [0, 1, 2, 3]),
        ("0-1\n", [0, 1]),
        ("", []),
        ("\n", []),
        ("65535", [65535]),
    ],
)
def test_parse_cpu_list(text: str, cpus: list[int]) -> None:
    assert _C.parse_cpu_list(text) == cpus


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a", "'a' is neither a number nor a range"),
        ("1,,2", "'' is neither a number nor a range"),
        ("1,", "'' is neither a number nor a range"),
        ("0-3,4-", "'4-' is neither a number nor a range"),
        ("-1", "'-1' is neither a number nor a range"),
        ("1-2-3", "'1-2-3' is neither a number nor a range"),
        ("0-8:2", "'0-8:2' is neither a number nor a range"),
        ("99999999999999999999", "'99999999999999999999' is neither a number nor a range"),
        ("3-1", "'3-1' runs backwards"),
        ("0-65536", "'0-65536' names a CPU above 65535"),
    ],
)
def test_parse_cpu_list_says_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(ValueError) as raised:
        _C.parse_cpu_list(text)
    message = str(raised.value)
    assert complaint in message
    assert f"'{text}'" in message
    assert "0-3,8,10-11" in message


@given(st.sets(st.integers(0, 300)))
def test_parse_cpu_list_reads_every_list_of_numbers(cpus: set[int]) -> None:
    assert _C.parse_cpu_list(",".join(map(str, cpus))) == sorted(cpus)


def test_numa_nodes_are_read_in_order_with_memory_only_nodes(tmp_path: Path) -> None:
    for node, cpus, kib in ((10, "4-7", 2048), (2, "0-3", 1024), (11, "", 512)):
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        (folder / "cpulist").write_text(f"{cpus}\n")
        (folder / "meminfo").write_text(f"Node {node} MemTotal:   {kib} kB\nNode {node} MemFree:   7 kB\n")
    (tmp_path / "nodestats").mkdir()
    (tmp_path / "online").write_text("2,10-11\n")

    assert _C.read_numa_nodes(str(tmp_path)) == [
        {"node": 2, "cpus": [0, 1, 2, 3], "memory_bytes": 1024 << 10},
        {"node": 10, "cpus": [4, 5, 6, 7], "memory_bytes": 2048 << 10},
        {"node": 11, "cpus": [], "memory_bytes": 512 << 10},
    ]


def test_no_numa_nodes_where_the_kernel_tells_of_none(tmp_path: Path) -> None:
    assert _C.read_numa_nodes(str(tmp_path / "absent")) == []


def test_cpu_info_describes_this_host() -> None:
    info = _C.cpu_info()
    assert info["architecture"] == platform.machine()
    assert set(info["isa"]) <= (ARM_SETS if info["architecture"] in ("aarch64", "arm64") else X86_SETS)
    assert 1 <= info["physical_cores"] <= info["logical_cpus"] == len(info["allowed_cpus"])
    assert info["transparent_huge_pages"] in ("always", "madvise", "never", None)
    assert info["numa_nodes"]
    assert all(node["memory_bytes"] > 0 for node in info["numa_nodes"])
    assert all(size is None or size > 0 for size in (info["l2_bytes"], info["l3_bytes"]))


@on_linux
def test_instruction_sets_are_those_that_the_kernel_lists() -> None:
    words: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            words |= set(value.split())
    spelled_by_the_kernel = {"asimd": "neon"}
    expected = {spelled_by_the_kernel.get(word, word) for word in words} & (X86_SETS | ARM_SETS)
    assert set(_C.cpu_info()["isa"]) == expected


@on_linux
def test_only_allowed_cpus_are_counted() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    try:
        os.sched_setaffinity(0, {one})
        info = _C.cpu_info()
    finally:
        os.sched_setaffinity(0, before)
    assert info["allowed_cpus"] == [one]
    assert info["logical_cpus"] == info["physical_cores"] == 1
    assert _C.cpu_info()["allowed_cpus"] == sorted(before)
