"""`import moe_fx` costs little: nothing optional and no part of torch that `import torch` alone does not load."""

from __future__ import annotations

import json
import subprocess
import sys

OPTIONAL = {"moe_fx._C", "rich", "torch_npu", "torchair", "transformers", "triton"}


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after one statement."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_moe_fx_loads_nothing_optional() -> None:
    loaded = modules_after("import moe_fx")
    assert not loaded & OPTIONAL
    assert not {"torch._inductor", "torch._dynamo"} & loaded


def test_import_moe_fx_loads_no_more_of_torch_than_torch_does() -> None:
    added = modules_after("import moe_fx") - modules_after("import torch")
    assert not {name for name in added if name.split(".")[0] == "torch"}
