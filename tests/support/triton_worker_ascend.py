"""Worker of triton_compile: kernels through triton-ascend to Linalg, then through bishengir-compile to HIVM.

Run as a script by a Python without site-packages (-S) whose PYTHONPATH names the folder that make test-triton-ascend
fills. Reads one JSON object from standard input, writes one JSON line a case to standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import ascendnpuir
from hivm import memory_bytes, scalar_loops
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

DEVICE = "Ascend910B3"
BISHENGIR = Path(ascendnpuir.__file__).with_name("bin") / "bishengir-compile"
# What triton-ascend itself passes to bishengir-compile for this device.
OPTIONS = (
    f"--target={DEVICE}",
    "--enable-auto-multi-buffer=True",
    "--enable-auto-bind-sub-block=True",
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
)
# Has the stand-in for hivmc, bishengir-compile's last step.
TOOLS = Path(__file__).with_name("bin")
# triton-ascend 3.2.0 reads memory it has freed (its pass triton-to-unstructure) and so is killed by a signal now and
# then; the same input passes when tried again.
ATTEMPTS = 4
SCALAR_WARNING = re.compile(r"Op '([\w.]+)' will execute by scalar instruction")


class CompileError(Exception):
    """A compiler refused the kernel. The message starts with the step that did."""


def main(job: dict[str, Any], out: TextIO) -> None:
    work = Path(job["work"])
    for case in job["cases"]:
        result: dict[str, Any] = {"name": case["name"]}
        try:
            result |= compile_case(case, job["package"], work)
        except CompileError as error:
            result["error"] = str(error)
        print(json.dumps(result), file=out, flush=True)


def compile_case(case: dict[str, Any], package: str, work: Path) -> dict[str, Any]:
    """Return what the parent reports of a kernel: memory, scalar loops, warnings. Files of the steps stay in work."""
    linalg = work / f"{case['name']}.linalg.mlir"
    # The mode for cube and vector units is for the launcher; bishengir-compile does not know the attribute.
    linalg.write_text(re.sub(r', mix_mode = "\w+"', "", to_linalg(case, package)))
    hivm, messages = to_hivm(linalg, work)
    return {
        "memory": memory_bytes(hivm),
        "loops": [[loop.does, loop.trips] for loop in scalar_loops(hivm)],
        "warnings": sorted(set(SCALAR_WARNING.findall(messages))),
    }


def to_linalg(case: dict[str, Any], package: str) -> str:
    module, function = case["kernel"].split(":")
    target = GPUTarget("npu", DEVICE, 0)
    backend = make_backend(target)
    options = backend.parse_options({})
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options)
    metadata = {**options.__dict__, "target": target, "hash": case["name"]}
    context = ir.context()
    ir.load_dialects(context)
    try:
        kernel = getattr(importlib.import_module(f"{package}{module}"), function)
        signature = {name: case["signature"][name] for name in kernel.arg_names if name in case["signature"]}
        source = ASTSource(kernel, signature, constants=case["constants"])
        ttir = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
        ttir = stages["ttir"](ttir, metadata)
    # Triton lets whatever a kernel's Python raises through.
    except Exception as error:
        raise CompileError(f"triton-ascend cannot parse it: {type(error).__name__}: {error}") from error
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return stages["ttadapter"](ttir, dict(metadata))
        except subprocess.CalledProcessError as error:
            killed = error.returncode < 0
            if not killed or attempt == ATTEMPTS:
                how = f"killed by signal {-error.returncode}, {ATTEMPTS} times" if killed else "failed"
                raise CompileError(f"triton-ascend to Linalg {how}: {errors(error.stderr.decode())}") from error
    raise AssertionError("the last attempt returns or raises")


def to_hivm(linalg: Path, work: Path) -> tuple[str, str]:
    hivm = linalg.with_suffix("").with_suffix(".hivm.mlir")
    environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}", "HIVM_MODULE": str(hivm)}
    command = [str(BISHENGIR), str(linalg), *OPTIONS, "-o", str(work / "unused.o")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode or not hivm.exists():
        overflow = re.search(r"(\w+) overflow, requires (\d+) bits while (\d+) bits available", done.stderr)
        if overflow:
            need, have = int(overflow[2]) // 8, int(overflow[3]) // 8
            raise CompileError(f"{overflow[1].upper()} overflow: needs {need} bytes, the core has {have}")
        how = f"killed by signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise CompileError(f"bishengir-compile to HIVM {how}: {errors(done.stderr)}")
    return hivm.read_text(), done.stdout + done.stderr


def errors(output: str) -> str:
    """The lines of a compiler's output that name an error, without the module it prints with them."""
    lines = dict.fromkeys(line.strip() for line in output.splitlines() if "error:" in line)
    return "\n".join(list(lines)[:5]) or output.strip()[:500] or "no message"


if __name__ == "__main__":
    # What the compilers print must not mix with the results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(json.load(sys.stdin), results)
