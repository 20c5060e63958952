"""The house itself: what the runtime loads, what the wheel holds, what no tracked file may hold."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trimvlm_tools.bench.peers import find_peer, peer_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "trimvlm": ROOT / "runtime/trimvlm",
    "trimvlm_export": ROOT / "export/trimvlm_export",
    "trimvlm_engines": ROOT / "engines/trimvlm_engines",
    "trimvlm_calib": ROOT / "calib_profiles/trimvlm_calib",
    "trimvlm_tools": ROOT / "tools/trimvlm_tools",
}
PEERS = PACKAGES["trimvlm_tools"] / "bench/peers"
WORKSTATION = ("torch", "transformers", "onnx", "yaml", "rich", "matplotlib")
DEVICE_LIBRARIES = ("onnxruntime", "tensorrt", "tensorrt_rtx", "cuda")
# Import names that differ from the distribution's.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "onnx_ir": "onnx-ir",
    "tensorrt_rtx": "tensorrt-rtx",
    "llama_cpp": "llama-cpp-python",
    "optimum": "optimum-intel",
}
# From the device's system (JetPack), never from an index of ours.
SYSTEM = {"tensorrt", "cuda", "pynvml"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [path for name in names.decode().split("\0") if name and (path := ROOT / name).is_file()]


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_import_trimvlm_loads_nothing_but_itself() -> None:
    code = (
        "import sys, time\nstart = time.process_time()\nimport trimvlm\nprint(time.process_time() - start)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    seconds, loaded = python(code).splitlines()
    third_party = set(ast.literal_eval(loaded)) - sys.stdlib_module_names - {"trimvlm", "__main__"}
    assert {name for name in third_party if not name.startswith(("_", "sitecustomize"))} == set()
    assert float(seconds) < 0.3


def test_no_module_of_the_runtime_loads_the_workstation_or_a_device_library() -> None:
    """Also the backends import theirs only when opened."""
    names = [
        ".".join(path.relative_to(PACKAGES["trimvlm"].parent).with_suffix("").parts)
        for path in PACKAGES["trimvlm"].rglob("*.py")
    ]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += f"print([name for name in {WORKSTATION + DEVICE_LIBRARIES} if name in sys.modules])"
    assert python(code) == "[]"


def test_onnx_runtime_sends_nothing(tmp_path: Path) -> None:
    """Its telemetry begins with an identifier and a database in the user's cache."""
    pytest.importorskip("onnxruntime")
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for code in ("import trimvlm, onnxruntime", "import trimvlm_tools.cli, onnxruntime"):
        subprocess.run([sys.executable, "-c", code], check=True, env=home, cwd=tmp_path)
    assert not list(tmp_path.rglob("*"))


def test_every_third_party_import_is_declared() -> None:
    project = pyproject()["project"]
    declared = {
        canonicalize_name(Requirement(line).name)
        for lines in (project["dependencies"], *project["optional-dependencies"].values())
        for line in lines
    }
    # A peer of the benchmark runs in an environment of its own, with the requirements that its file declares.
    theirs = {
        canonicalize_name(Requirement(line).name)
        for name in peer_names()
        for line in find_peer(name).REQUIREMENTS
    }
    undeclared = set()
    for package in PACKAGES.values():
        for path in package.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                else:
                    continue
                for name in (name.partition(".")[0] for name in names):
                    known = name in sys.stdlib_module_names or name in PACKAGES or name in SYSTEM
                    allowed = declared | theirs if path.parent == PEERS else declared
                    if not known and canonicalize_name(DISTRIBUTIONS.get(name, name)) not in allowed:
                        undeclared.add((str(path.relative_to(ROOT)), name))
    assert undeclared == set()


def test_constraints_pin_every_direct_dependency_and_nothing_else_but_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        assert pin.url is None and re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), str(pin)
    data = pyproject()
    extras = data["project"]["optional-dependencies"]
    wanted = [
        *data["project"]["dependencies"],
        *data["dependency-groups"]["dev"],
        *data["build-system"]["requires"],
    ]
    wanted += [line for extra in ("export", "ort", "rtx", "tools") for line in extras[extra]]
    for line in wanted:
        requirement = Requirement(line)
        for python_version in ("3.10", "3.11", "3.12", "3.13"):
            versions = [
                str(pin.specifier)[2:]
                for pin in pins
                if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
                and (pin.marker is None or pin.marker.evaluate({"python_version": python_version}))
            ]
            assert len(versions) == 1, f"{requirement.name} on Python {python_version}: {versions}"
            assert versions[0] in requirement.specifier, f"{requirement} against {versions[0]}"


def test_the_wheel_holds_the_five_packages_whole(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    missing = [
        name
        for path in tracked()
        for package in PACKAGES.values()
        if path.is_relative_to(package) and (name := path.relative_to(package.parent).as_posix()) not in names
    ]
    assert missing == []
    assert any(name.startswith("trimvlm_engines/targets/") and name.endswith(".yaml") for name in names)
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    assert not [name for name in names if "__pycache__" in name]
    requires = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("Requires-Dist: ")]
    base = {Requirement(line).name for line in requires if "extra ==" not in line}
    assert base == {"numpy", "msgspec", "tokenizers", "pillow"}
    assert "License-Expression: Apache-2.0" in text


def test_no_tracked_file_names_a_registry_or_a_place_of_one_machine() -> None:
    hosts = ("python" + "hosted", "pypi" + r"\.org", "registry" + r"\.npmjs", "deb" + r"\.debian")
    places = ("/ro" + "ot/", "/wo" + "rk/", "/ho" + "me/[a-z]", "/Us" + "ers/[a-z]")
    wrong = re.compile("|".join(hosts + places).encode())
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked()
        if (match := wrong.search(path.read_bytes()))
    ]
    assert found == []


def test_files_are_named_for_what_they_do() -> None:
    nameless = {"utils.py", "util.py", "common.py", "helpers.py", "base.py", "misc.py"}
    assert [str(path) for path in tracked() if path.name in nameless] == []


def test_the_documented_profile_is_one() -> None:
    import yaml

    from trimvlm.profile import to_profile
    from trimvlm.schedule import Schedule

    text = (ROOT / "docs/profile.md").read_text("utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    profile = to_profile(yaml.safe_load(block), source="docs/profile.md")
    assert Schedule.resolve(profile, profile.model).mean_visual_tokens == 122.5
    for field in (*profile.decisions.__struct_fields__, *profile.decisions.layers[0].__struct_fields__):
        assert f"`{field}`" in text
