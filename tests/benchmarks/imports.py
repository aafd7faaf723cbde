"""What importing pgen costs beside importing Pyro, and what its help costs.

python tests/benchmarks/imports.py
"""

from __future__ import annotations

import subprocess
import sys
import time

CASES = {
    "python": "pass",
    "import torch": "import torch",
    "import pyro": "import pyro",
    "import pgen": "import pgen",
    "import pgen; pgen.fit": "import pgen; pgen.fit",
    "pgen --help": "import sys; from pgen.cli import main; sys.argv = ['pgen', '--help']; main()",
}


def seconds(code: str) -> float:
    """Wall time of a fresh interpreter that runs the code."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(tries: int = 5) -> None:
    """Print the least of a few measurements of each; a busy machine only adds to them."""
    for name, code in CASES.items():
        print(f"{name:24} {min(seconds(code) for _ in range(tries)):6.2f} s")


if __name__ == "__main__":
    main()
