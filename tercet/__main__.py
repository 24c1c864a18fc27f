"""`python -m tercet`: the `tercet` command where it is not on the PATH, as in a Ray job that brings a wheel."""

from tercet.cluster.cli import main

main()
