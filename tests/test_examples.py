"""The examples run as they stand and show what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMISES = {
    "transformers_model.py": ["relative error against eager", "qk_norm_rope"],
    "hand_written_moe.py": ["largest difference from eager"],
    "quantized_model.py": ["int4 g128, int8 activations", "relative error of the logits", "from the file: True"],
    "explain_a_miss.py": ["neither a known score", "explain_a_miss.py:"],
    "own_pass.py": ["x * sigmoid(x)", "the sigmoid of another tensor"],
}


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PROMISES)


@pytest.mark.parametrize("name", PROMISES)
def test_example(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    text = " ".join(done.stdout.split())
    assert [promise for promise in PROMISES[name] if promise not in text] == []
