"""``python -m loracle``, as ``torchrun`` and ``accelerate launch`` start it."""

from loracle.cli import main

if __name__ == "__main__":
    main(prog_name="loracle")
