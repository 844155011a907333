"""A pytest plug-in, `-p tests.references.bare_machine`: a machine without the optional packages.

They may be installed. To see that ``tests/gpu`` needs none of them.
"""

import sys

ABSENT = ("nvidia.dali", "sklearn", "scipy", "transformers", "datasets", "PIL", "torch_fidelity", "matplotlib")

for name in ABSENT:
    # What importing a missing package raises, ModuleNotFoundError, is raised for None, too.
    sys.modules[name] = None
