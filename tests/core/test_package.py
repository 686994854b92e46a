"""What is published: the wheel with torch alone, its metadata, the version, a release's notes."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from zipfile import ZipFile

import pytest

import paceline

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# In a process that sees the wheel, torch and what torch needs, as after `pip install paceline`.
ALONE = """
import io, sys
sys.modules |= dict.fromkeys(sys.argv[2].split(","))
import torch, paceline
from paceline import PACE, Pullback, cli, load_checkpoint, save_checkpoint
assert paceline.__file__.startswith(sys.argv[1]), paceline.__file__
for name in paceline.__all__:
    getattr(paceline, name)
model = torch.nn.Linear(8, 1)
for opt in (
    PACE(model.parameters(), lr=5e-2, gain="scalar", pullback=1.0, kappa=0.3, return_kappa=0.7),
    Pullback(torch.optim.SGD(model.parameters(), lr=1e-2), 0.1),
):
    for _ in range(3):
        model(torch.ones(4, 8)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    save_checkpoint(sys.argv[1] + "/checkpoint.pt", model, opt)
    load_checkpoint(sys.argv[1] + "/checkpoint.pt", model, opt)
    opt.eval()
assert cli.main(["--version"]) == 0
assert cli.main([]) == 0
print("status", cli.main(["train", "demo-sft"]))
"""


def needed_by(name, found=None):
    """The names of a distribution and of all that it needs."""
    found = set() if found is None else found
    plain = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()
    if plain not in found:
        found.add(plain)
        try:
            needs = requires(plain) or []
        except PackageNotFoundError:
            return found
        for need in needs:
            if "extra ==" not in need:
                needed_by(need, found)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without network, as pip builds it."""
    if not os.environ.get("PACELINE_CI"):
        pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    [built] = folder.glob("*.whl")
    return built


def test_the_wheel_works_with_torch_alone(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--disable-pip-version-check", "--target", tmp_path, wheel]
    subprocess.run(command, check=True)
    allowed = {*needed_by("torch"), "paceline", "pip"}
    others = {
        module
        for module, owners in packages_distributions().items()
        if not allowed & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
    }
    assert {"numpy", "pydantic", "transformers"} <= others
    assert "torch" not in others
    run = [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path), ",".join(others)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(run, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "status 2" in found.stdout
    assert "pip install 'paceline[train]'" in found.stderr


def test_the_wheel_has_all_files_of_the_package_and_no_others(wheel):
    source = ROOT / "src"
    files = {x.relative_to(source).as_posix() for x in source.rglob("*") if x.is_file()}
    files = {name for name in files if "__pycache__" not in name and "egg-info" not in name}
    packed = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files


def test_the_metadata_are_what_an_index_takes(wheel):
    metadata = pytest.importorskip("packaging.metadata")
    [name] = [x for x in ZipFile(wheel).namelist() if x.endswith(".dist-info/METADATA")]
    found = metadata.Metadata.from_email(ZipFile(wheel).read(name), validate=True)
    assert (found.name, str(found.version)) == ("paceline", PROJECT["version"])
    assert found.license_expression == "Apache-2.0"
    assert found.description_content_type == "text/markdown"
    assert "# paceline" in found.description
    own = [str(need) for need in found.requires_dist if "extra" not in str(need.marker or "")]
    assert own == ["torch>=2.6"]
    assert set(found.provides_extra) == set(PROJECT["optional-dependencies"])


def test_the_classifiers_exist():
    known = pytest.importorskip("trove_classifiers")
    assert not {*PROJECT["classifiers"]} - known.classifiers


def test_the_version_is_the_same_everywhere():
    cited = re.search(r"(?m)^version: (.+)$", (ROOT / "CITATION.cff").read_text())[1]
    noted = re.search(r"(?m)^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text())[1]
    assert {PROJECT["version"], paceline.__version__} == {cited} == {noted}


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_notes_of_a_release_are_those_of_its_version(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    version, log = PROJECT["version"], tmp_path / "CHANGELOG.md"

    def notes(version):
        command = ["make", "-s", "release-notes", f"PYTHON={sys.executable}", f"VERSION={version}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    dated = f"# Changelog\n\n## {version} (2026-12-01)\n\n### Added\n- This.\n"
    log.write_text(f"{dated}\n## 0.0.1 (2026-01-01)\n\n- That.\n")
    assert notes(version).stdout == "### Added\n- This.\n"
    for wrong in ("0.0.1", "0.0.2"):  # the package is another, there is none
        assert notes(wrong).returncode
        assert "CHANGELOG.md has no dated" in notes(wrong).stderr
    log.write_text(dated.replace("2026-12-01", "unreleased"))
    assert notes(version).returncode


def test_workflows_are_yaml_and_those_that_publish_wait_for_the_owner():
    yaml = pytest.importorskip("yaml")
    folder = ROOT / ".github"
    pages = {x.stem: yaml.safe_load(x.read_text()) for x in folder.glob("*/*.yml")}
    assert {"ci", "release", "docs", "bug", "config"} <= pages.keys()
    runs = [step.get("run", "") for step in pages["ci"]["jobs"]["ci"]["steps"]]
    assert any(".ci/run" in command for command in runs)
    tested = pages["ci"]["jobs"]["ci"]["strategy"]["matrix"]["python"]
    stated = [x.split()[-1] for x in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", x)]
    assert tested == stated
    for name in ("release", "docs"):
        first = next(iter(pages[name]["jobs"].values()))
        assert first["if"].startswith("vars.")
    assert pages["release"]["jobs"]["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert pages["release"]["jobs"]["build"]["needs"] == "ci"
    assert any("doctor" in str(part) for part in pages["bug"]["body"])
