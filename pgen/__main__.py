"""`python -m pgen`: the command line."""

from pgen.cli import main

if __name__ == "__main__":
    main(prog_name="pgen")
