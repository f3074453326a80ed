"""Worker of triton_compile: kernels through upstream Triton to sm_90 code, which needs no GPU.

Run as a script, without torch and without Triton's interpreter. Reads one JSON object from standard input, writes one
JSON line a case to standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
# The allocator of torch aligns tensors to more than this. A launch finds it out and the kernel is built for it.
ALIGNED = [["tt.divisibility", 16]]


def main(job: dict[str, Any], out: TextIO) -> None:
    for case in job["cases"]:
        result: dict[str, Any] = {"name": case["name"]}
        try:
            result["memory"] = {"shared": compile_case(case, job["package"], Path(job["work"]))}
        # Triton lets whatever a kernel's Python raises through.
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(result), file=out, flush=True)


def compile_case(case: dict[str, Any], package: str, work: Path) -> int:
    """Return the bytes of shared memory that the kernel takes; its code stays in work."""
    module, function = case["kernel"].split(":")
    kernel = getattr(importlib.import_module(f"{package}{module}"), function)
    types = case["signature"]
    attributes = {(i,): ALIGNED for i, name in enumerate(kernel.arg_names) if types.get(name, "").startswith("*")}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=case["constants"],
        attrs=attributes,
    )
    compiled = triton.compile(source, target=HOPPER, options=case["options"])
    (work / f"{case['name']}.cubin").write_bytes(compiled.asm["cubin"])
    return compiled.metadata.shared


if __name__ == "__main__":
    # What the compilers print must not mix with the results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(json.load(sys.stdin), results)
