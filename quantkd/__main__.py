"""`python -m quantkd`, for launchers such as `torchrun -m quantkd capture ...`."""

from quantkd.cli.main import main

if __name__ == "__main__":
    main()
