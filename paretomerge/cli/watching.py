"""The commands that look at a search while it runs: `status` and `dashboard`."""

from typing import Annotated

import typer

from paretomerge.cli import session
from paretomerge.cli.options import StudyFile


def status(
    study_yaml: StudyFile,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Follow the search until it ends; Ctrl-C leaves the view."
        ),
    ] = False,
    every: Annotated[
        float, typer.Option(help="With --watch: seconds between two looks.", min=0.1)
    ] = 2.0,
) -> None:
    """Show the progress of a study."""
    from paretomerge.cli import status

    study = session.open_study(study_yaml)
    if watch:
        try:
            status.watch(study, session.console(), every)
        except KeyboardInterrupt:
            # The way to leave the view, and no interruption of anything.
            raise typer.Exit from None
        return
    lines = status.summary_lines(study.results(), study.settings.total_trials)
    for line in lines:
        session.console().print(line, highlight=False, soft_wrap=True)


def dashboard(
    study_yaml: StudyFile,
    port: Annotated[
        int,
        typer.Option(help="Of this machine; 0 for any free one.", min=0, max=65535),
    ] = 8080,
) -> None:
    """Show a study in a browser, with Optuna's dashboard, until Ctrl-C.

    It serves this machine alone. It shows a copy: nothing that is clicked changes the study. It
    follows a search that runs, and needs the extra `paretomerge[dashboard]`.
    """
    from paretomerge.cli.dashboard import make_server

    study = session.open_study(study_yaml)
    with make_server(study, port) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        try:
            session.console().print(
                f"Open {address} in a browser; Ctrl-C ends it.",
                highlight=False,
                soft_wrap=True,
            )
            server.serve_forever()
        except KeyboardInterrupt:
            raise typer.Exit from None
