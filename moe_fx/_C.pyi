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

class PackedSpec(TypedDict):
    """The sizes of a layer of packed weights; see PackedSpec in csrc/cpu/format.h."""

    format: str
    experts: int
    hidden: int
    intermediate: int
    gated: bool
    group: int
    zero_points: bool
    biases: bool
    segments: int

class HugeBuffer:
    """Zeroed memory of huge pages, a writable buffer of uint8 [nbytes]."""

    def __init__(self, nbytes: int) -> None: ...
    @property
    def address(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def packed_bytes(spec: PackedSpec) -> int: ...
def begin_packed(address: int, nbytes: int, spec: PackedSpec) -> None: ...
def packed_spec(address: int, nbytes: int) -> PackedSpec: ...
def pack_float(
    address: int, nbytes: int, expert: int, projection: str, data: int, row_stride: int, dtype: str, threads: int
) -> None: ...
def pack_int8(
    address: int,
    nbytes: int,
    expert: int,
    projection: str,
    data: int,
    row_stride: int,
    scales: int,
    scale_stride: int,
    threads: int,
) -> None: ...
def pack_int4(
    address: int,
    nbytes: int,
    expert: int,
    projection: str,
    data: int,
    row_stride: int,
    scales: int,
    scale_stride: int,
    zeros: int,
    zero_stride: int,
    threads: int,
) -> None: ...
def pack_bias(address: int, nbytes: int, expert: int, projection: str, bias: int, stride: int) -> None: ...
def unpack(address: int, nbytes: int, expert: int, projection: str, out: int) -> None: ...
def page_nodes(address: int, nbytes: int, step: int) -> list[int]: ...

class EngineInfo(TypedDict):
    """``isa``: the kernels in use, one of ``available``; ``nodes``: CPUs per memory node, one thread each."""

    isa: str
    available: list[str]
    nodes: list[list[int]]
    made_up_nodes: bool
    own_threads: bool

# (address, bytes between experts, bytes between rows)
Strided = tuple[int, int, int]

def engine_info() -> EngineInfo: ...
def use_openmp(library: str) -> bool: ...
def make_huge(address: int, nbytes: int, /) -> bool: ...
def topology_segments() -> int: ...
def streaming_read_seconds(address: int, nbytes: int, threads: int, /) -> float: ...

# dtypes are "f32", "bf16" or "f16"; x [tokens, H], weights and ids [tokens, top_k] and y [tokens, H] are contiguous;
# expert_map is 0 or the address of int32 [map_size].
def run_dense(
    dtype: str,
    experts: int,
    hidden: int,
    intermediate: int,
    gate: Strided,
    up: Strided | None,
    down: Strided,
    gate_bias: Strided | None,
    up_bias: Strided | None,
    down_bias: Strided | None,
    act: str,
    alpha: float,
    limit: float | None,
    weight_on_input: bool,
    x: int,
    x_dtype: str,
    tokens: int,
    top_k: int,
    weights: int,
    weights_dtype: str,
    ids: int,
    ids_are_int64: bool,
    expert_map: int,
    map_size: int,
    y: int,
    y_dtype: str,
    threads: int,
    /,
) -> None: ...
def run_packed(
    address: int,
    nbytes: int,
    act: str,
    alpha: float,
    limit: float | None,
    weight_on_input: bool,
    int8_activations: bool,
    x: int,
    x_dtype: str,
    tokens: int,
    top_k: int,
    weights: int,
    weights_dtype: str,
    ids: int,
    ids_are_int64: bool,
    expert_map: int,
    map_size: int,
    y: int,
    y_dtype: str,
    threads: int,
    /,
) -> None: ...

class Submission:
    """A call on packed weights, prepared once; the arguments are those of run_packed, which must stay alive."""

    submit_callback: int
    wait_callback: int
    def __init__(
        self,
        address: int,
        nbytes: int,
        act: str,
        alpha: float,
        limit: float | None,
        weight_on_input: bool,
        int8_activations: bool,
        x: int,
        x_dtype: str,
        tokens: int,
        top_k: int,
        weights: int,
        weights_dtype: str,
        ids: int,
        ids_are_int64: bool,
        expert_map: int,
        map_size: int,
        y: int,
        y_dtype: str,
        /,
    ) -> None: ...
    @property
    def address(self) -> int: ...
    def submit(self, tokens: int) -> None: ...
    def wait(self) -> None: ...
    def done(self) -> bool: ...
