"""`python -m distspec`."""

from distspec.cli import main

if __name__ == "__main__":
    main()
