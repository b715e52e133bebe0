"""Builds roadmap_ext._C, the CPU kernels, and roadmap_ext._cuda, the CUDA kernels, where tools/cuda.py allows them.

They are two so that one installation serves every torch: _cuda is loaded where torch has a CUDA of its major version.

Environment: FORCE_CUDA=1 fails where CUDA kernels cannot be had, FORCE_CUDA=0 leaves them out; CUDA_HOME and
TORCH_CUDA_ARCH_LIST as torch reads them; ROADMAP_EXT_NO_BUILD=1 installs the plain PyTorch reference alone.
"""

import os
import sys
from glob import glob
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

# Before setup(), where an older one stops at pyproject.toml with 90 lines about the project's license.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"roadmap_ext needs setuptools>=77 to build, found {setuptools.__version__}: "
        'pip install "setuptools>=77", then build again.'
    )

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # a build frontend does not put it there

NO_BUILD = os.environ.get("ROADMAP_EXT_NO_BUILD") == "1"
MARKER = "_reference_only.py"


class BuildPy(build_py):
    """Leaves a marker in an installation without kernels, so that it is not taken for a broken one."""

    def run(self):
        super().run()
        marker = Path("roadmap_ext" if self.editable_mode else Path(self.build_lib, "roadmap_ext")) / MARKER
        if NO_BUILD:
            marker.write_text('"""Installed with ROADMAP_EXT_NO_BUILD=1: there are no kernels, on purpose."""\n')
        else:
            marker.unlink(missing_ok=True)


def extensions():
    """The modules, and the command class that builds them."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            "roadmap_ext builds against the torch it will run with, and none is installed here: install torch>=2.11, "
            "then run `pip install --no-build-isolation .` again, or set ROADMAP_EXT_NO_BUILD=1 for the plain PyTorch "
            "reference alone."
        ) from error
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < (2, 11):
        raise SystemExit(f"roadmap_ext needs torch>=2.11, found {torch.__version__}: upgrade torch and build again.")
    try:
        import pybind11
    except ImportError as error:
        raise SystemExit("roadmap_ext needs pybind11 to build: pip install pybind11 ninja") from error

    from tools.cuda import decide

    os.chdir(HERE)
    cuda_sources = sorted(glob("csrc/cuda/*.cu"))
    capabilities = []
    if torch.cuda.is_available():
        capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    decision = decide(torch.__version__, torch.version.cuda, cuda_sources, os.environ, capabilities)
    print(decision, flush=True)

    def text(value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    macros = [
        ("TORCH_TARGET_VERSION", "0x020b000000000000"),  # the oldest torch that the binary has to work with
        ("ROADMAP_TORCH_VERSION", text(torch.__version__)),
        ("ROADMAP_CUDA_VERSION", text(torch.version.cuda if decision.build else "")),
        ("ROADMAP_CUDA_REASON", text(decision.reason)),
        ("ROADMAP_CUDA_ARCHS", text(decision.archs)),
    ]
    # No contraction: error-free transformations are written out, and every product rounds where the code says so.
    flags = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
    # Error messages name source files: as they lie in the packages, not on the machine that compiled them.
    packages = {Path(module.__file__).parent.parent for module in (torch, pybind11)}
    hardened = [f"-ffile-prefix-map={folder}/=" for folder in (*packages, HERE)]
    if sys.platform == "linux":
        hardened += ["-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
    arguments = {
        "include_dirs": [pybind11.get_include()],  # first: torch 2.11's own copy does not compile with a target version
        "define_macros": macros,
        "extra_compile_args": {"cxx": flags + hardened},
        "extra_link_args": ["-Wl,-z,relro,-z,now"] if sys.platform == "linux" else [],
        "depends": sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
    }
    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/**/*.cpp", recursive=True))
    modules = [cpp_extension.CppExtension("roadmap_ext._C", sources, **arguments)]
    if not decision.build:
        return modules, cpp_extension.BuildExtension
    os.environ["CUDA_HOME"] = str(decision.root)
    os.environ["TORCH_CUDA_ARCH_LIST"] = decision.archs
    cpp_extension.CUDA_HOME = str(decision.root)  # read when torch was imported
    host = [f"-Xcompiler={flag}" for flag in ("-fvisibility=hidden", *hardened)]
    nvcc = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", *host]
    arguments["define_macros"] = [*macros, ("USE_CUDA", "1")]
    arguments["extra_compile_args"] = {"cxx": flags + hardened, "nvcc": nvcc}
    sources = cuda_sources + sorted(glob("csrc/cuda/*.cpp"))
    modules.append(cpp_extension.CUDAExtension("roadmap_ext._cuda", sources, **arguments))
    return modules, cpp_extension.BuildExtension


commands = {"build_py": BuildPy}
modules = []
# Metadata and source archives need no torch; whatever compiles does.
if not NO_BUILD and not {"egg_info", "sdist", "dist_info", "--version", "clean"} & set(sys.argv[1:2]):
    modules, commands["build_ext"] = extensions()

setuptools.setup(ext_modules=modules, cmdclass=commands)
