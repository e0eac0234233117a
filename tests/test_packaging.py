"""The wheel and the sdist contain what a user needs, and CITATION.cff is up to date."""

import ctypes
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

import hatch_build
import llmc_attnmask

ROOT = Path(__file__).parents[1]
LIBRARY = str(hatch_build.SOURCES / hatch_build.LIBRARY)
WITHOUT_COMPILER = """
import sys
sys.modules["ziglang"] = None  # not importable
from hatchling.cli import hatchling
sys.argv = ["hatchling", "build", "--target", "wheel", "-d", sys.argv[1]]
sys.exit(hatchling())
"""
RECIPES = {path.name for path in ROOT.glob("recipes/*.yaml")}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, built without isolation: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        yield archive


def test_the_wheel_contains_the_model_the_recipes_and_types(wheel):
    names = set(wheel.namelist())
    model = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {f"llmc_attnmask/builtin/model/{name}" for name in model} <= names
    assert RECIPES and {f"llmc_attnmask/builtin/recipes/{r}" for r in RECIPES} <= names
    assert "llmc_attnmask/py.typed" in names
    modules = {str(p.relative_to(ROOT)) for p in ROOT.glob("llmc_attnmask/**/*.py")}
    assert modules <= names
    others = {name for name in names if not name.startswith("llmc_attnmask")}
    assert not others, "a wheel puts this package and no other in site-packages"


def test_the_wheels_recipes_are_found_without_a_clone(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = (
        "from llmc_attnmask.oneshot.shipped import recipes; print(*recipes().values())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    found = [Path(word) for word in done.stdout.split()]
    assert {path.name for path in found} == RECIPES
    assert {path.parent for path in found} == {
        tmp_path / "llmc_attnmask/builtin/recipes"
    }


def test_the_wheel_has_the_command_and_the_plugin(wheel):
    (points,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    text = wheel.read(points).decode()
    assert "llmc-attnmask = llmc_attnmask.cli:main" in text
    assert "[vllm.general_plugins]" in text
    (metadata,) = [n for n in wheel.namelist() if n.endswith("METADATA")]
    fields = message_from_bytes(wheel.read(metadata))
    assert fields["Version"] == llmc_attnmask.__version__
    assert {"compress", "serve", "eval"} <= set(fields.get_all("Provides-Extra"))


def test_the_sdist_contains_whatever_the_wheel_is_built_from(built, wheel):
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"recipes/{recipe}" for recipe in RECIPES} <= names
    assert {"README.md", "LICENSE", "CITATION.cff", "pyproject.toml"} <= names
    packaged = {n for n in wheel.namelist() if ".dist-info/" not in n} - {LIBRARY}
    inside = {n.replace("llmc_attnmask/builtin/recipes", "recipes") for n in packaged}
    assert inside <= names


@pytest.mark.skipif(not hatch_build.wanted(), reason="another system")
def test_the_wheel_has_the_compiled_kernels_and_fits_every_python(wheel):
    assert LIBRARY in wheel.namelist()
    (found,) = [n for n in wheel.namelist() if n.endswith("/WHEEL")]
    fields = message_from_bytes(wheel.read(found))
    assert fields["Tag"] == "py3-none-linux_x86_64"
    assert fields["Root-Is-Purelib"] == "false"


@pytest.mark.parametrize("reason", ["no compiler", "declined"])
def test_without_a_compiler_the_package_installs_and_says_what_it_lacks(
    reason, tmp_path
):
    env = {"PATH": str(tmp_path / "empty")}
    if reason == "declined":
        env = os.environ | {hatch_build.SWITCH: "0"}
    subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER, tmp_path],
        cwd=ROOT,
        env=env,
        check=True,
        capture_output=True,
    )
    (file,) = tmp_path.glob("*-py3-none-any.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(file) as archive:
        assert LIBRARY not in archive.namelist()
        archive.extractall(installed)
    code = (
        "from llmc_attnmask.serving.kernels import select; import torch;"
        "layer = select.Layer(64, 64, torch.bfloat16, True, '16-bit');"
        "print(select.choose(layer, select.Machine.detect()).reason)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.match("this CPU lacks|built without CPU kernels", done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not hatch_build.wanted(), reason="another system")
def test_the_compiler_from_pypi_builds_the_same_functions(tmp_path):
    library = tmp_path / hatch_build.LIBRARY
    command = [sys.executable, "-m", "ziglang", "c++"]
    hatch_build.compile_library(command, ROOT / hatch_build.SOURCES, library)
    loaded = ctypes.CDLL(str(library))
    for kernel in ("two_of_four", "any_mask"):
        for dtype in ("bf16", "int8"):
            assert hasattr(loaded, f"{kernel}_{dtype}")
            assert hasattr(loaded, f"{kernel}_{dtype}_pack")


def test_a_compiler_that_fails_is_quoted(tmp_path):
    (tmp_path / "wrong.cpp").write_text("#error this is wrong\n")
    command = hatch_build.compiler()
    with pytest.raises(
        RuntimeError, match=r"LLMC_ATTNMASK_COMPILE=0[^!]*this is wrong"
    ):
        hatch_build.compile_library(command, tmp_path, tmp_path / "library.so")
    assert not (tmp_path / "library.so").exists()


def test_the_citation_names_the_paper_and_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == llmc_attnmask.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    (paper,) = citation["references"]
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Liang", "Long", "Shi", "Song", "Zhou"]
    assert paper["identifiers"][0]["value"] == "arXiv:2410.11261"
