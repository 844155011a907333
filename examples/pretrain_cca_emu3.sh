#!/usr/bin/env bash
# Valid as bash and as Python, since torchrun hands its script to Python:
#   torchrun examples/pretrain_cca_emu3.sh [--config FILE] [--set SECTION.KEY=VALUE ...] [--device auto|cpu|cuda]
#   torchrun --nproc_per_node 2 examples/pretrain_cca_emu3.sh --set parallel.tensor_model_parallel_size=2
#   bash examples/pretrain_cca_emu3.sh [the same arguments]     (NPROC_PER_NODE processes; default 1)
#   NPROC_PER_NODE=2 nohup bash examples/pretrain_cca_emu3.sh ... > log 2>&1 &      (goes on when the terminal closes)
# Python reads the bash part as a docstring; bash reads the Python part as a here-document.
""":"
set -euo pipefail
script="${BASH_SOURCE[0]}"
python="$(cd "$(dirname "$script")/.." && pwd)/.venv/bin/python"
[ -x "$python" ] || python=python3
[ "${NPROC_PER_NODE:-1}" = 1 ] && exec "$python" "$script" "$@"
# torchrun itself ends at SIGHUP, nohup or not.
agent="$(dirname "$(readlink -f "$script")")/cluster/agent.py"
exec "$python" "$agent" --standalone --nproc_per_node "$NPROC_PER_NODE" "$script" "$@"
: <<'PYTHON'
":"""

import sys

PYTHON = "the name that ends bash's here-document, on the last line"


def main(argv=None):
    """Train as the command line says; None means this process's."""
    try:
        from megatron_cca.programs.train import main as train
    except ModuleNotFoundError as error:
        sys.exit(f"pretrain_cca_emu3.sh: {error.name} is not installed in {sys.executable}; run `make install` first")
    train(argv)


# Guarded, since Megatron's checkpoint writer spawns a helper process that imports this file again.
if __name__ == "__main__":
    main()

PYTHON
