"""`python -m quantkd`, for launchers such as `torchrun -m quantkd capture ...`."""

from quantkd.cli.main import run

if __name__ == "__main__":
    run()
