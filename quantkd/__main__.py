"""`python -m quantkd`, for launchers such as `torchrun -m quantkd train ...`."""

from quantkd.cli.main import run

if __name__ == "__main__":
    run()
