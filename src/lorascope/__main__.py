"""`python -m lorascope` is `lorascope`."""

from lorascope.cli import main

main()
