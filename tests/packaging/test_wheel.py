"""A wheel built from this repository holds the whole package and works where the repository is out of reach."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "moe_fx": "moe_fx/", "passes": "moe_fx/passes/", "lowering": "moe_fx/lowering/", "csrc/ascendc": "moe_fx/ascendc/",
}  # fmt: skip
# Caches; a kernel library that was built into the repository; of csrc/ascendc, what only its tests need.
EXCLUDED = {"__pycache__", "libmoe_fx_ascendc.so", "model", "tests"}
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")

# Run with the wheel in front of sys.path and without the site's .pth files, which the editable install hooks in by.
PROGRAM = """
import json, sys
import moe_fx, moe_fx.passes, moe_fx.lowering
from moe_fx import _C
from importlib.metadata import distribution

files = [module.__file__ for module in (moe_fx, moe_fx.passes, moe_fx.lowering, _C)]
backends = distribution("moe-fx").entry_points.select(group="torch_dynamo_backends")
print(json.dumps({
    "files": files,
    "cpus": _C.cpu_info()["logical_cpus"],
    "backends": {entry.name: entry.value for entry in backends},
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the working tree, built as a user's pip would build it: isolated, in a build folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("--config-settings", f"build-dir={folder / 'build'}")
    subprocess.run([*PIP, "wheel", "--no-deps", *build, "--wheel-dir", folder, ROOT], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        prefix + path.relative_to(ROOT / folder).as_posix()
        for folder, prefix in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not EXCLUDED & {path.name, *path.relative_to(ROOT).parts}
    }
    assert {"moe_fx/py.typed", "moe_fx/_C.pyi", "moe_fx/passes/__init__.py", "moe_fx/lowering/__init__.py"} <= expected
    (extension,) = names - expected
    assert re.fullmatch(r"moe_fx/_C\.[\w-]+\.so", extension)
    assert expected <= names


def test_wheel_declares_its_entry_points_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())
        metadata = archive.read(f"{info}/METADATA").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert entry_points["torch_dynamo_backends"]["moe_ascend"] == "moe_fx.backend:moe_ascend"
    assert entry_points["console_scripts"]["moe-fx"] == "moe_fx.cli:main"
    assert "License-Expression: Apache-2.0" in metadata


def test_wheel_works_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True)

    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), *dependencies])}
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout)
    assert all(Path(file).is_relative_to(target) for file in seen["files"])
    assert seen["cpus"] >= 1
    assert seen["backends"] == {"moe_ascend": "moe_fx.backend:moe_ascend"}
