"""What importing a part of the package drags in, each in a fresh interpreter."""

import subprocess
import sys

import pytest

LIGHT = [
    "echokv_vllm",
    "echokv_vllm.config",
    "echokv_vllm.metrics",
    "echokv_vllm.plugin",
    "echokv_vllm.cli.main",
]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("module", LIGHT)
def test_import_is_light(module):
    done = run(
        f"import sys, {module}\n"
        "print(*{'torch', 'vllm', 'transformers'} & set(sys.modules), end='')"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_kernels_and_training_work_where_vllm_is_not_installed():
    """Every module is imported, not only what the packages import by themselves."""
    done = run(
        "import importlib, pkgutil, sys\n"
        "sys.modules['vllm'] = None  # any import of it now fails\n"
        "import echokv_kernels\n"
        "assert 'echokv_vllm' not in sys.modules\n"
        "import echokv_vllm.train\n"
        "names = ('plan', 'checkpoint', 'fingerprint', 'rope')\n"
        "names = [f'echokv_vllm.{name}' for name in names]\n"
        "for package in (echokv_kernels, echokv_vllm.train):\n"
        "    entries = pkgutil.walk_packages(package.__path__, package.__name__ + '.')\n"
        "    names += [entry.name for entry in entries]\n"
        "for name in names:\n"
        "    importlib.import_module(name); print(name)\n"
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 15
