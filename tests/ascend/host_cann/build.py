"""Compile the stand-in: acl.cpp, ge.cpp, and a stub that returns 0 for every other CANN symbol that torch_npu needs.

Built once per version of torch_npu and of these sources, into the repository's build folder; takes a few seconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
# The libraries that torch_npu links against. One holds everything, the others pull it in.
HOLDER = "libascendcl"
LIBRARIES = (
    HOLDER, "libhccl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel", "libfmk_parser",
    "libascend_protobuf", "libatb",
)  # fmt: skip
_SYSTEM = ("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libgcc_s.so.1", "libstdc++.so.6",
           "ld-linux-x86-64.so.2")  # fmt: skip
_SYSTEM_FOLDERS = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64")
# Names that torch_npu looks up with dlsym; it treats a missing one as an old CANN.
_LOOKED_UP = re.compile(
    rb"(?<=\x00)((?:acl(?:rt|mdl|op|tdt|sys|Get|Set|Create|Destroy)|Hccl)[A-Z][A-Za-z0-9]+)(?=\x00)"
)


def libraries() -> Path:
    """Folder of the built libraries, built first where needed.

    Raises:
        RuntimeError: torch_npu, a compiler or ``nm`` is missing; the message says which.
    """
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch_npu is not installed; run `make test-ascend`, which has an environment of its own")
    for tool in ("g++", "nm"):
        if not shutil.which(tool):
            raise RuntimeError(f"the CANN stand-in needs {tool}; Debian: apt-get install g++ binutils")
    digest = hashlib.sha256(version("torch_npu").encode() + version("torch").encode())
    for source in (*sorted(HERE.glob("*.[ch]*")), HERE / "build.py"):
        digest.update(source.read_bytes())
    folder = ROOT / "build" / "host_cann" / digest.hexdigest()[:16]
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        _build(Path(spec.origin).parents[1], partial)
        if folder.exists():  # Another process was faster.
            shutil.rmtree(partial)
        else:
            partial.rename(folder)
    return folder


def _build(site_packages: Path, out: Path) -> None:
    out.mkdir(parents=True)
    objects = []
    for source in sorted(HERE.glob("*.cpp")):
        objects.append(out / f"{source.stem}.o")
        # torch_npu's interface to CANN uses the old C++ ABI.
        flags = ["-std=c++17", "-O1", "-fPIC", "-D_GLIBCXX_USE_CXX11_ABI=0"]
        _run("g++", *flags, "-c", str(source), "-o", str(objects[-1]))
    stubs = out / "stubs.S"
    lines = [f".globl {s}\n.type {s},@function\n{s}: xorl %eax,%eax\n ret\n" for s in _missing(site_packages, objects)]
    stubs.write_text('.text\n.section .note.GNU-stack,"",@progbits\n.text\n' + "".join(lines))
    holder = out / f"{HOLDER}.so"
    _run("g++", "-shared", "-fPIC", f"-Wl,-soname,{HOLDER}.so", "-o", str(holder), *map(str, objects), str(stubs))
    for name in LIBRARIES:
        if name != HOLDER:
            link = [f"-Wl,-soname,{name}.so", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN"]
            source = ["-x", "c", "/dev/null", "-x", "none", str(holder)]
            _run("gcc", "-shared", "-nostdlib", *link, "-o", str(out / f"{name}.so"), *source)


def _missing(site_packages: Path, objects: list[Path]) -> list[str]:
    """Every symbol that torch_npu links against or looks up, and that neither PyTorch, libc nor our objects have."""
    extensions = sorted((site_packages / "torch_npu").rglob("*.so"))
    providers = [*(site_packages / "torch" / "lib").glob("*.so*"), *extensions]
    for library in _SYSTEM:
        providers += [Path(d, library) for d in _SYSTEM_FOLDERS if Path(d, library).exists()][:1]
    defined = {name for file in providers for name, _ in _symbols(file, "-D", "--defined-only")}
    needed = {
        name
        for file in extensions
        for name, kind in _symbols(file, "-D", "--undefined-only")
        if kind == "U" and not name.startswith(("Py", "_Py"))
    }
    for file in extensions:
        needed |= {match.decode() for match in _LOOKED_UP.findall(file.read_bytes())}
    ours = {name for file in objects for name, _ in _symbols(file, "--defined-only")}
    return sorted(needed - defined - ours)


def _symbols(file: Path, *options: str) -> Iterator[tuple[str, str]]:
    listing = subprocess.run(["nm", "-P", *options, str(file)], capture_output=True, text=True).stdout
    for line in listing.splitlines():
        name, kind, *_ = line.split()
        yield name.split("@")[0], kind


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


if __name__ == "__main__":
    sys.stdout.write(f"{libraries()}\n")
