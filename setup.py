"""Package metadata. All of it is here; pyproject.toml holds tool settings only."""

from pathlib import Path

from setuptools import find_packages, setup

# `kernels` stays out of the package path: Hugging Face owns that import name.
PACKAGES = find_packages(include=["echokv_vllm", "echokv_vllm.*"]) + find_packages(
    "kernels", include=["echokv_kernels", "echokv_kernels.*"]
)

setup(
    name="echokv-vllm",
    version="0.1.0",
    description="EchoKV for vLLM: KV cache compression that rebuilds dropped KV heads on the fly",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir={"echokv_kernels": "kernels/echokv_kernels"},
    package_data={"echokv_vllm": ["py.typed"], "echokv_kernels": ["py.typed"]},
    install_requires=[
        "vllm>=0.31,<0.34",
        "torch",
        "triton",
        "transformers",
        "safetensors",
        "huggingface_hub",
        "tqdm",
        "fastapi",
        "uvicorn",
        "pydantic",
    ],
    extras_require={
        "datasets": ["datasets"],
        # Needed by some measures of `echokv eval` only; each says so when it is missing.
        "eval": ["datasets", "matplotlib", "rapidfuzz", "rouge"],
    },
    entry_points={
        "vllm.general_plugins": ["echokv = echokv_vllm.plugin:register"],
        "vllm.stat_logger_plugins": ["echokv = echokv_vllm.stat_logger:EchoStatLogger"],
        "console_scripts": ["echokv = echokv_vllm.cli.main:main"],
    },
)
