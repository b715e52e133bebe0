"""How the package is built: what tools/ decides about CUDA, and what comes out of the real packaging commands."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import roadmap_ext
from roadmap_ext import ap_loss, extension
from tools import cuda, toolkit

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["csrc/cuda/rows_float.cu"]


def make_toolkit(root, version="13.0", headers=True):
    """A folder that looks like a toolkit: its nvcc runs and states a version."""
    nvcc = root / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {version}, V{version}.88"\n')
    nvcc.chmod(0o755)
    if headers:
        (root / "include").mkdir()
        (root / "include" / "cuda_runtime.h").touch()
    return root


def decide(*roots, torch_cuda="13.0", sources=SOURCES, environ=None, capabilities=()):
    return cuda.decide("2.13.0", torch_cuda, sources, environ or {}, capabilities, candidates=lambda _: list(roots))


# --- tools/cuda.py ---------------------------------------------------------------------------------------------------


def test_matching_toolkit_builds(tmp_path):
    root = make_toolkit(tmp_path / "cuda", "13.2")
    decision = decide(root)
    assert decision.build
    assert decision.root == root
    assert decision.archs == "7.5;8.0;9.0;10.0;11.0;12.0+PTX"
    assert str(decision) == f"CUDA kernels: built for {decision.archs} with the toolkit at {root}"


def test_first_real_toolkit_is_taken(tmp_path):
    wrapper = make_toolkit(tmp_path / "wrapper", headers=False)
    root = make_toolkit(tmp_path / "cuda")
    assert decide(tmp_path / "nowhere", wrapper, root).root == root


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("cpu torch", "torch 2.13.0 is a CPU build: install a CUDA build of torch and build again"),
        ("no sources", "the sources of the CUDA kernels, csrc/cuda, are not in this tree"),
        ("no toolkit", "no CUDA toolkit was found for torch's CUDA 13.0"),
        ("wrapper", "no CUDA toolkit was found for torch's CUDA 13.0"),
        ("other major", "is CUDA 12.8, but torch 2.13.0 was built with CUDA 13.0: their major versions must agree"),
        ("broken nvcc", "does not run: install a toolkit for CUDA 13.0"),
    ],
)
def test_what_keeps_cuda_out(tmp_path, case, reason, forced):
    root = make_toolkit(tmp_path / "cuda", "12.8" if case == "other major" else "13.0", headers=case != "wrapper")
    if case == "broken nvcc":
        (root / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    arguments = {
        "torch_cuda": None if case == "cpu torch" else "13.0",
        "sources": [] if case == "no sources" else SOURCES,
        "environ": {"FORCE_CUDA": "1"} if forced else {},
    }
    if case == "no toolkit":
        root = tmp_path / "nowhere"
    if forced:
        with pytest.raises(SystemExit, match=r"^FORCE_CUDA=1, but the CUDA kernels cannot be built: ") as raised:
            decide(root, **arguments)
        assert reason in str(raised.value)
    else:
        decision = decide(root, **arguments)
        assert not decision.build
        assert reason in decision.reason
        assert str(decision) == f"CUDA kernels: not built because {decision.reason}"


def test_force_cuda_0_leaves_them_out(tmp_path):
    decision = decide(make_toolkit(tmp_path / "cuda"), environ={"FORCE_CUDA": "0"}, capabilities=[(9, 0)])
    assert not decision.build
    assert decision.reason == "FORCE_CUDA=0 was set"


@pytest.mark.parametrize(
    ("environ", "capabilities", "version", "archs"),
    [
        ({"TORCH_CUDA_ARCH_LIST": " 8.6+PTX "}, [(9, 0)], "13.0", "8.6+PTX"),
        ({}, [(9, 0), (8, 0), (9, 0)], "13.0", "8.0;9.0"),
        ({}, [], "13.0", "7.5;8.0;9.0;10.0;11.0;12.0+PTX"),
        ({}, [], "12.8", "7.5;8.0;9.0;10.0;12.0+PTX"),
        ({}, [], "12.6", "7.5;8.0;9.0+PTX"),
    ],
)
def test_archs(environ, capabilities, version, archs):
    assert cuda.choose_archs(environ, capabilities, version) == archs


def test_candidates_are_explicit_ones_first(tmp_path):
    on_path = make_toolkit(tmp_path / "on_path")
    environ = {"CUDA_HOME": "/a", "CUDA_PATH": "/b", "PATH": str(on_path / "bin")}
    assert cuda.toolkit_candidates(environ) == [Path("/a"), Path("/b"), on_path, Path("/usr/local/cuda")]
    assert cuda.toolkit_candidates({"PATH": str(tmp_path)}) == [Path("/usr/local/cuda")]


# --- tools/toolkit.py ------------------------------------------------------------------------------------------------


class Installer:
    """Stands for pip: unpacks the layout of NVIDIA's packages, or fails."""

    def __init__(self, works=True):
        self.works = works
        self.calls = []

    def __call__(self, torch_cuda, folder):
        self.calls.append(torch_cuda)
        if not self.works:
            raise subprocess.CalledProcessError(1, "pip")
        root = make_toolkit(folder / "nvidia" / ("cu" + torch_cuda.split(".")[0]), torch_cuda)
        (root / "lib").mkdir()
        (root / "lib" / "libcudart.so.13").touch()


def choose(tmp_path, *roots, torch_cuda="13.0", sources=SOURCES, environ=None, gpu=True, installer=None):
    return toolkit.choose(
        torch_cuda,
        sources,
        environ or {},
        tmp_path / ".cuda",
        candidates=lambda _: list(roots),
        gpu=lambda: gpu,
        installer=installer or Installer(works=False),
    )


def test_present_toolkit_is_used(tmp_path):
    older, root = make_toolkit(tmp_path / "older", "12.8"), make_toolkit(tmp_path / "cuda", "13.2")
    installer = Installer()
    assert choose(tmp_path, older, root, installer=installer) == root
    assert not installer.calls


def test_packages_are_installed_once_and_link(tmp_path):
    older = make_toolkit(tmp_path / "older", "12.8")
    installer = Installer()
    root = choose(tmp_path, older, installer=installer)
    assert root == tmp_path / ".cuda" / "nvidia" / "cu13"
    assert (root / "lib" / "libcudart.so").resolve() == (root / "lib" / "libcudart.so.13").resolve()
    assert choose(tmp_path, older, installer=installer) == root
    assert installer.calls == ["13.0"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"torch_cuda": None},
        {"sources": []},
        {"environ": {"FORCE_CUDA": "0"}},
        {"gpu": False},
        {"torch_cuda": "12.8"},
    ],
    ids=["cpu torch", "no sources", "FORCE_CUDA=0", "no gpu", "no packages for CUDA 12"],
)
def test_nothing_is_installed_without_need(tmp_path, arguments):
    installer = Installer()
    assert choose(tmp_path, installer=installer, **arguments) is None
    assert not installer.calls


def test_force_cuda_installs_without_a_gpu(tmp_path):
    assert choose(tmp_path, environ={"FORCE_CUDA": "1"}, gpu=False, installer=Installer()) is not None


def test_failed_install_says_what_to_do(tmp_path, capsys):
    assert choose(tmp_path) is None
    said = capsys.readouterr()
    assert "install a CUDA 13.0 toolkit and set CUDA_HOME" in said.err
    assert not said.out  # the answer alone goes there


def test_has_gpu_reads_the_driver_list(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not toolkit.has_gpu()
    listing = tmp_path / "nvidia-smi"
    for line, expected in (("GPU 0: NVIDIA H100 (UUID: GPU-0)", True), ("No devices found.", False)):
        listing.write_text(f'#!/bin/sh\necho "{line}"\n')
        listing.chmod(0o755)
        assert toolkit.has_gpu() is expected


# --- the modules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "found", "reason"),
    [
        ("", "13.0", "nobody built them"),
        ("13.0", None, "is a CPU build: install a CUDA 13 build of torch"),
        ("12.8", "13.0", "built for CUDA 12.8 and torch .* brings CUDA 13.0, another major version"),
        ("13.0", "13.2", "they do not load: no library"),
    ],
)
def test_cuda_kernels_are_left_out_for_a_reason(monkeypatch, built, found, reason):
    """One build serves every torch: what it cannot run there it does not load, and says why."""

    def load(name):
        raise ImportError("no library")

    module = SimpleNamespace(cuda_version=built, cuda_reason="nobody built them")
    monkeypatch.setattr(extension, "_C", module)
    monkeypatch.setattr(extension, "import_module", load)
    monkeypatch.setattr(torch.version, "cuda", found)
    assert re.search(reason, extension._load_cuda())


def test_cuda_kernels_are_loaded_by_a_torch_of_their_major_version(monkeypatch):
    loaded = []
    monkeypatch.setattr(extension, "_C", SimpleNamespace(cuda_version="13.0", cuda_reason=""))
    monkeypatch.setattr(extension, "import_module", loaded.append)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert extension._load_cuda() == ""
    assert loaded == ["roadmap_ext._cuda"]


# --- the shared object -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_object():
    """The one that these tests run with."""
    if roadmap_ext._C is None:
        pytest.skip("roadmap_ext was installed without kernels")
    return Path(roadmap_ext._C.__file__)


def test_no_source_is_named_by_its_place_on_this_machine(shared_object):
    """Messages name source files, and only so are these in it; their folders are whose machine it was."""
    named = set(re.findall(rb"[\w./+-]*\.(?:h|cpp|cuh?)(?=\0)", shared_object.read_bytes()))
    assert b"csrc/ops.cpp" in named
    assert not [name for name in named if name.startswith(b"/")]


@pytest.mark.skipif(sys.platform != "linux", reason="of ELF, which is Linux's")
def test_hardened(shared_object):
    """All is bound and read-only before the first call; arrays that overflow, on the stack or not, are noticed."""
    readelf = shutil.which("readelf")
    if not readelf:
        pytest.skip("needs readelf (Debian and Ubuntu: binutils)")

    def read(*what):
        return subprocess.run([readelf, *what, shared_object], capture_output=True, text=True, check=True).stdout

    assert re.search(r"\(FLAGS(_1)?\) .*\b(BIND_)?NOW\b", read("-dW"))
    assert "GNU_RELRO" in read("-lW")
    imported = re.findall(r" UND (\w+)", read("--dyn-syms", "-W"))
    assert "__stack_chk_fail" in imported
    assert any(name.endswith("_chk") for name in imported)  # of _FORTIFY_SOURCE, such as __memcpy_chk


# --- the real packaging ----------------------------------------------------------------------------------------------


def run(*command, cwd, path=None, **environ):
    """Run this Python with `command`, seeing neither the source tree nor the settings of the surrounding build."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "ROADMAP_EXT_NO_BUILD", "FORCE_CUDA")
    }
    if path:
        kept["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=kept | environ, capture_output=True, text=True
    )


def succeed(*command, **arguments):
    result = run(*command, **arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pip_wheel(tree, out, **environ):
    """The wheel that pip builds from `tree`, installed into a folder of its own."""
    pip = ("-m", "pip", "--disable-pip-version-check")
    succeed(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", out, tree, cwd=out, **environ)
    (wheel,) = out.glob("roadmap_ext-*.whl")
    target = out / "installed"
    succeed(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=out)
    return wheel, target


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources with nothing built in it."""
    copy = tmp_path_factory.mktemp("tree") / "roadmap_ext"
    made = [".git", ".venv*", ".cuda", ".*_cache", "build", "dist", "*.egg-info", "*.so", "__pycache__"]
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*made, "_reference_only.py"))
    return copy


@pytest.fixture(scope="module")
def sdist_tree(tree, tmp_path_factory):
    """The source archive, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    succeed("-m", "build", "--sdist", "--no-isolation", "--outdir", out, tree, cwd=out)
    (archive,) = out.glob("roadmap_ext-*.tar.gz")
    with tarfile.open(archive) as contents:
        contents.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


def test_sdist_holds_everything(sdist_tree):
    tracked = ("csrc", "roadmap_ext", "tests", "tools")
    suffixes = {".cpp", ".h", ".cu", ".cuh", ".py", ".pyi", ".typed"}
    wanted = {
        path.relative_to(ROOT)
        for folder in tracked
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and path.name != "_reference_only.py"
    }
    wanted |= {Path(name) for name in ("LICENSE", "Makefile", "constraints.txt", "pyproject.toml", "setup.py")}
    assert not {path for path in wanted if not (sdist_tree / path).is_file()}
    assert not list(sdist_tree.rglob("*.so"))


COMPUTE = """
import json, warnings, torch, roadmap_ext
scores = torch.linspace(-1, 1, 60, dtype=torch.float64).sin().mul(50).cos().reshape(4, 15)
target = torch.arange(60).reshape(4, 15) % 4 == 0
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    losses = [roadmap_ext.ap_loss(scores, target).item() for _ in range(3)]
    roadmap_ext.smooth_rank(scores, target)
try:
    pairwise = roadmap_ext.ap_loss(scores, target, method="pairwise").item()
except RuntimeError as error:
    pairwise = str(error)
print(json.dumps({
    "file": roadmap_ext.__file__,
    "losses": losses,
    "pairwise": pairwise,
    "warnings": [[w.category.__name__, str(w.message), w.filename] for w in caught if "roadmap" in str(w.message)],
    "info": roadmap_ext.build_info(),
}))
"""


def expected_loss():
    """What COMPUTE has to find, from the extension that the other tests have checked."""
    scores = torch.linspace(-1, 1, 60, dtype=torch.float64).sin().mul(50).cos().reshape(4, 15)
    return ap_loss(scores, torch.arange(60).reshape(4, 15) % 4 == 0).item()


@pytest.mark.deep
def test_wheel_from_the_sdist_works_elsewhere(sdist_tree, tmp_path):
    wheel, target = pip_wheel(sdist_tree, tmp_path, FORCE_CUDA="0")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")]
    assert "roadmap_ext/py.typed" in names
    assert not [name for name in names if not name.startswith("roadmap_ext")]  # neither tools nor tests
    found = json.loads(succeed("-c", COMPUTE, cwd=tmp_path, path=target))
    assert Path(found["file"]).is_relative_to(target)
    assert found["losses"] == pytest.approx([expected_loss()] * 3, rel=1e-12)
    assert found["pairwise"] == pytest.approx(expected_loss(), rel=1e-12)
    assert not found["warnings"]
    assert found["info"]["cuda_reason"] == "FORCE_CUDA=0 was set"
    said = succeed("-m", "roadmap_ext", "--no-benchmark", cwd=tmp_path, path=target)
    assert said.rstrip().endswith("self-test: passed")
    assert (target / "bin" / "roadmap-ext").is_file()


def test_wheel_without_kernels(tree, tmp_path):
    wheel, target = pip_wheel(tree, tmp_path, ROADMAP_EXT_NO_BUILD="1")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    found = json.loads(succeed("-c", COMPUTE, cwd=tmp_path, path=target))
    assert Path(found["file"]).is_relative_to(target)
    assert found["losses"] == pytest.approx([expected_loss()] * 3, rel=1e-12)
    ((category, message, _),) = found["warnings"]
    assert category == "RuntimeWarning"
    assert "ROADMAP_EXT_NO_BUILD=1" in message
    assert "pip install --no-build-isolation" in found["pairwise"]
    assert found["info"]["cpu"] == "reference"


def test_build_without_torch_is_one_sentence(tree, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    result = run("setup.py", "build_ext", cwd=tree, path=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("roadmap_ext builds against the torch it will run with, and none is installed here")
    assert "pip install --no-build-isolation ." in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_build_with_old_setuptools_is_one_sentence(tree, tmp_path):
    (tmp_path / "setuptools" / "command").mkdir(parents=True)
    (tmp_path / "setuptools" / "__init__.py").write_text('__version__ = "65.5.0"\n')
    (tmp_path / "setuptools" / "command" / "build_py.py").write_text("class build_py: ...\n")
    result = run("setup.py", "egg_info", cwd=tree, path=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("roadmap_ext needs setuptools>=77 to build, found 65.5.0: pip install")
    assert len(result.stderr.splitlines()) == 1


def test_source_tree_without_its_extension_says_so(tree):
    result = run("-c", "import roadmap_ext", cwd=tree)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: roadmap_ext was imported from {tree / 'roadmap_ext'}, which has no compiled")
    assert "make build" in last
