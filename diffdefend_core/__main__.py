"""`python3 -m diffdefend_core`: the command line, as the containers call it."""

from diffdefend_core.cli import main

main()
