"""`python -m paretomerge`."""

from paretomerge.cli.main import main

main()
