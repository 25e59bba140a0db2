"""`python -m fusedgpt.train ...` is `fusedgpt train ...`, for launchers that take a module, like torchrun."""

import sys

from fusedgpt.train.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
