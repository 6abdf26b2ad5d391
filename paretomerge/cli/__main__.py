"""`python -m paretomerge.cli.main`."""

from paretomerge.cli.main import main

main()
