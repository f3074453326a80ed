"""Tells which targets this machine can serve and, for the others, what is missing and the way out.

`diagnose()` looks and returns plain data; `render()` lays that out for a terminal. Optional packages (Triton,
torch_npu, transformers) are looked up by their metadata and never imported: one that is half installed can end the
process.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_fx.ascend_library import VARIABLE, default_path, misfit, named_path
from moe_fx.errors import MissingToolchainError

if TYPE_CHECKING:
    from moe_fx._C import CpuInfo

__all__ = ["SUPPORTED_TORCH", "Check", "Diagnosis", "Target", "diagnose", "render"]

SUPPORTED_TORCH = ((2, 10), (2, 14))
"""The torch releases that moe-fx works with: from the first, up to but without the second."""

_TRITON_DISTRIBUTIONS = ("triton", "triton-ascend")
_REPORTED_SOFTWARE = ("moe-fx", "torch", "transformers", *_TRITON_DISTRIBUTIONS, "torch-npu")


@dataclass(frozen=True)
class Check:
    """One thing that a target needs, or merely profits from when it is not `required`."""

    name: str
    ok: bool
    found: str
    """What is there, in words; what is wrong with it when not `ok`."""
    remedy: str = ""
    """The way out when not `ok`."""
    required: bool = True


@dataclass(frozen=True)
class Target:
    """One kind of device that moe-fx lowers to, with everything that was looked at for it."""

    name: str
    checks: tuple[Check, ...]

    @property
    def ready(self) -> bool:
        """Whether nothing that the target requires is missing."""
        return all(check.ok for check in self.checks if check.required)


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose()` saw."""

    system: str
    software: Mapping[str, str | None]
    """Versions of Python and of the packages that matter; None for one that is not installed."""
    cpu: CpuInfo | None
    """The host as `moe_fx._C.cpu_info()` describes it; None when the extension cannot be loaded."""
    targets: tuple[Target, ...]
    cache: Check | None = None
    """The compile cache: where it is and what it holds, or why it is not used."""

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain data, fit for JSON."""
        return {
            "system": self.system,
            "software": dict(self.software),
            "cpu": self.cpu,
            "cache": asdict(self.cache) if self.cache else None,
            "targets": {
                target.name: {"ready": target.ready, "checks": [asdict(check) for check in target.checks]}
                for target in self.targets
            },
        }


def diagnose() -> Diagnosis:
    """Look at this machine. Takes a second or two, most of it the import of torch."""
    cpu, extension = _check_extension()
    torch = _check_torch()
    return Diagnosis(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        software={"python": platform.python_version(), **{name: _version(name) for name in _REPORTED_SOFTWARE}},
        cpu=cpu,
        targets=(
            Target("cpu", (torch, _check_inductor(), extension, *_check_engine(), *_check_host(cpu))),
            Target("cuda", (torch, _check_cuda_device(), _check_triton(), _check_c_compiler())),
            Target(
                "ascend",
                (
                    torch,
                    _check_torch_npu(),
                    _check_torchair(),
                    _check_cann(),
                    _check_npu(),
                    _check_ascendc(),
                    _check_triton_ascend(),
                ),
            ),
        ),
        cache=_check_cache(),
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, int]:
    """The first two numbers of a version, such as (2, 13) for '2.13.0+cpu'."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ValueError(f"'{version}' does not start like a version, with two numbers and a dot between them")
    return int(match[1]), int(match[2])


def _check_torch() -> Check:
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED_TORCH)
    remedy = f"pip install 'torch>={low},<{high}'"
    version = _version("torch")
    if version is None:
        return Check("torch", False, "not installed", remedy)
    if not SUPPORTED_TORCH[0] <= _release(version) < SUPPORTED_TORCH[1]:
        return Check("torch", False, f"{version} is outside >={low},<{high}", remedy)
    return Check("torch", True, version)


def _find_compiler(variable: str, candidates: tuple[str, ...]) -> str | None:
    """The first compiler that exists: what the environment variable names, or else one of the candidates."""
    named = os.environ.get(variable)
    return next((path for name in ([named] if named else candidates) if (path := shutil.which(name))), None)


def _check_inductor() -> Check:
    name = "Inductor"
    # Inductor tries no other compiler than this one, unless CXX names it.
    default = "clang++" if sys.platform == "darwin" else "g++"
    compiler = _find_compiler("CXX", (default,))
    if compiler is None:
        named = os.environ.get("CXX")
        found = f"CXX names '{named}', which is not there" if named else f"no {default} found"
        return Check(name, False, found, f"install {default}, or name a compiler in the environment variable CXX")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        remedy = "install the headers of this Python (python3-dev on Debian, python3-devel on openEuler)"
        return Check(name, False, f"compiler {compiler}, but no Python.h", remedy)
    return Check(name, True, f"compiler {compiler}")


def _check_extension() -> tuple[CpuInfo | None, Check]:
    name = "moe_fx._C"
    try:
        from moe_fx import _C
    except ImportError as error:
        return None, Check(name, False, str(error), "reinstall moe-fx: pip install --force-reinstall --no-deps moe-fx")
    return _C.cpu_info(), Check(name, True, "loaded")


def _check_engine() -> tuple[Check, ...]:
    """What the expert engine runs on, as it says itself. Without it experts run through Inductor or the reference."""
    name = "expert engine"
    try:
        from moe_fx._C import engine_info
    except ImportError:
        return ()
    try:
        info = engine_info()
    except ValueError as error:  # MOE_FX_ISA or MOE_FX_NUMA names what is not there.
        return (Check(name, False, str(error), "correct or unset the variable that the message names"),)
    threads, nodes = sum(map(len, info["nodes"])), len(info["nodes"])
    made_up = " made up by MOE_FX_NUMA" if info["made_up_nodes"] else ""
    places = f"{nodes} memory node{'s' if nodes > 1 else ''}{made_up}"
    shared = "threads of its own" if info["own_threads"] else "PyTorch's threads"
    found = f"{info['isa']} (of {', '.join(info['available'])}), {threads} threads on {places}, {shared}"
    return (Check(name, True, found, required=False),)


def _check_host(cpu: CpuInfo | None) -> tuple[Check, ...]:
    """What makes the expert kernels fast. Nothing here is required: the PyTorch reference runs on any processor."""
    if cpu is None:
        return ()
    simd = bool({"avx2", "neon"} & set(cpu["isa"]))
    pages = cpu["transparent_huge_pages"]
    return (
        Check(
            "instruction sets",
            simd,
            " ".join(cpu["isa"]) or "none that a kernel uses",
            "experts run through the PyTorch reference here; the kernels need AVX2 or NEON",
            required=False,
        ),
        Check(
            "huge pages",
            pages in ("always", "madvise"),
            f"transparent huge pages: {pages or 'unknown'}",
            "packed weights stream faster with them: write 'madvise' to /sys/kernel/mm/transparent_hugepage/enabled",
            required=False,
        ),
    )


def _check_cuda_device() -> Check:
    name = "CUDA device"
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check(name, False, f"torch cannot be imported: {error}", "reinstall torch")
    if torch.version.cuda is None:
        return Check(name, False, "this build of torch has no CUDA", "install a CUDA build of torch")
    if not torch.cuda.is_available():
        return Check(name, False, "torch sees no device", "check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES")
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    found = ", ".join(f"{device.name} (sm_{device.major}{device.minor})" for device in devices)
    return Check(name, True, f"{found}, CUDA {torch.version.cuda}")


def _check_triton() -> Check:
    version = _version("triton")
    if version is None:
        return Check("Triton", False, "not installed", "pip install triton (a CUDA build of torch brings it along)")
    return Check("Triton", True, version)


def _check_c_compiler() -> Check:
    name = "C compiler"
    compiler = _find_compiler("CC", ("gcc", "clang", "cc"))
    if compiler is None:
        return Check(name, False, "none found", "install gcc or clang: Triton compiles kernel launchers with it")
    return Check(name, True, compiler)


def _check_torch_npu() -> Check:
    torch, torch_npu = _version("torch"), _version("torch-npu")
    release = ".".join(map(str, _release(torch))) if torch else None
    remedy = f"pip install 'torch-npu=={release}.*'" if release else "install torch, then the torch-npu of its release"
    if torch_npu is None:
        return Check("torch_npu", False, "not installed", remedy)
    if torch is None or _release(torch) != _release(torch_npu):
        return Check("torch_npu", False, f"{torch_npu} does not fit torch {torch}", remedy)
    return Check("torch_npu", True, torch_npu)


def _check_torchair() -> Check:
    """torchair ships inside torch_npu, which does not declare what torchair imports."""
    missing = [name for name in ("packaging", "protobuf") if _version(name) is None]
    if missing:
        return Check("torchair", False, f"{' and '.join(missing)} not installed", f"pip install {' '.join(missing)}")
    return Check("torchair", True, "its undeclared dependencies are installed (packaging, protobuf)")


def _check_cann() -> Check:
    home = os.environ.get("ASCEND_HOME_PATH")
    remedy = "install the CANN toolkit and source its set_env.sh"
    if not home:
        return Check("CANN", False, "ASCEND_HOME_PATH is not set", remedy)
    if not Path(home).is_dir():
        return Check("CANN", False, f"ASCEND_HOME_PATH names {home}, which is not a folder", remedy)
    return Check("CANN", True, home)


def _check_npu() -> Check:
    devices = sorted(path.name for path in Path("/dev").glob("davinci[0-9]*"))
    if not devices:
        remedy = "check the driver with npu-smi info; a container needs /dev/davinci* and /dev/davinci_manager"
        return Check("NPU", False, "no /dev/davinci device", remedy)
    return Check("NPU", True, ", ".join(devices))


def _check_ascendc() -> Check:
    """The library of Ascend C kernels, which is looked for and not loaded."""
    name, named = "Ascend C kernels", named_path()
    path = named or default_path()
    if path.is_file():
        try:
            reason = misfit(path)
        except MissingToolchainError as error:
            reason = str(error)
        what, _, remedy = reason.partition("; ")
        return Check(name, not reason, f"{path}: {what}" if what else str(path), remedy, required=False)
    if named is not None:
        return Check(name, False, f"{VARIABLE} names {named}, which is no file", f"correct or unset {VARIABLE}", False)
    remedy = "optional kernels for int4 experts at decode, built where CANN is: moe-fx build-ascend"
    return Check(name, False, "not built", remedy, required=False)


def _check_triton_ascend() -> Check:
    version = _version("triton-ascend")
    remedy = "its kernels are optional: pip install triton-ascend, in an environment without upstream Triton"
    return Check("Triton-Ascend", version is not None, version or "not installed", remedy, required=False)


def _check_cache() -> Check:
    """A cache that is off or unusable costs time at start and nothing else: no target requires it."""
    from moe_fx.cache.store import open_store
    from moe_fx.errors import MoeFxError
    from moe_fx.options import Options

    name = "compile cache"
    try:
        options = Options.from_user()
        if not options.cache:
            remedy = "unset MOE_FX_CACHE to keep compiled graphs"
            return Check(name, False, "switched off by MOE_FX_CACHE", remedy, required=False)
        store = open_store(options, create=False)
    except MoeFxError as error:
        what, _, remedy = str(error).partition("; ")
        return Check(name, False, what, remedy, required=False)
    nearest = next(path for path in (store.folder, *store.folder.parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        remedy = "set MOE_FX_CACHE_DIR to a directory that you can write to"
        return Check(name, False, f"{store.folder} cannot be written to", remedy, required=False)
    files = store.files()
    damaged = sum(bool(problem) for _, problem in store.verify())
    held = _size(sum(path.stat().st_size for path in files)) if files else "nothing"
    found = f"{store.folder}: {len(files)} entries, {held} of {options.cache_max_mib} MiB"
    if damaged:
        remedy = "they are compiled anew when they are needed; moe-fx cache verify names them"
        return Check(name, False, f"{found}, {damaged} of them cannot be used", remedy, required=False)
    return Check(name, True, found, required=False)


def render(diagnosis: Diagnosis) -> RenderableType:
    """The diagnosis for a terminal: the host, the software, then each target with what it needs."""
    return Group(_render_facts(diagnosis), *(_render_target(target) for target in diagnosis.targets))


def _render_facts(diagnosis: Diagnosis) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("system", diagnosis.system)
    if (cpu := diagnosis.cpu) is not None:
        processor = cpu["brand"] or cpu["vendor"] or cpu["architecture"]
        facts.add_row("processor", f"{processor}, {cpu['physical_cores']} cores, {cpu['logical_cpus']} threads")
        caches = {"L2": cpu["l2_bytes"], "L3": cpu["l3_bytes"]}
        known = [f"{name} {_size(size)}" for name, size in caches.items() if size]
        facts.add_row("caches", ", ".join(known) or "unknown")
        for node in cpu["numa_nodes"]:
            cpus = f"{len(node['cpus'])} CPUs" if node["cpus"] else "memory only"
            facts.add_row(f"NUMA node {node['node']}", f"{cpus}, {_size(node['memory_bytes'])}")
    for package, version in diagnosis.software.items():
        facts.add_row(package, version or Text("not installed", style="dim"))
    if (check := diagnosis.cache) is not None:
        cache = Text(check.found, style="" if check.ok else "yellow")
        if check.remedy:
            cache.append(f"\n→ {check.remedy}")
        facts.add_row(check.name, cache)
    return facts


def _render_target(target: Target) -> Table:
    verdict = "[green]ready[/]" if target.ready else "[red]not ready[/]"
    table = Table(
        title=f"\n[bold]{target.name}[/]: {verdict}", title_justify="left", box=None, show_header=False, padding=(0, 1)
    )
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in target.checks:
        mark = "[green]✓[/]" if check.ok else "[red]✗[/]" if check.required else "[yellow]-[/]"
        detail = Text(check.found)
        if not check.ok and check.remedy:
            detail.append(f"\n→ {check.remedy}", style="yellow")
        table.add_row(mark, check.name, detail)
    return table


def _size(count: int) -> str:
    """A number of bytes in the largest binary unit that leaves at least one of it."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
