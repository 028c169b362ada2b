"""`python -m distspec`."""

from distspec.cli import main

main()
