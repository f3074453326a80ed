"""The signatures of the extension module that csrc/bindings.cpp builds."""

from typing import TypedDict

class NumaNode(TypedDict):
    node: int
    cpus: list[int]
    memory_bytes: int

class CpuInfo(TypedDict):
    architecture: str
    vendor: str | None
    brand: str | None
    isa: list[str]
    allowed_cpus: list[int]
    logical_cpus: int
    physical_cores: int
    l2_bytes: int | None
    l3_bytes: int | None
    transparent_huge_pages: str | None
    numa_nodes: list[NumaNode]

def cpu_info() -> CpuInfo: ...
def parse_cpu_list(text: str, /) -> list[int]: ...
def read_numa_nodes(root: str = ...) -> list[NumaNode]: ...
