"""`python -m greatctl` is the same as `greatctl`."""

from greatctl.cli import main

if __name__ == "__main__":
    main()
