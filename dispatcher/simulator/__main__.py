"""`python -m dispatcher.simulator` is the command `dispatcher simulator` by itself."""

import typer

from dispatcher.simulator.command import simulator

app = typer.Typer(add_completion=False)
app.command()(simulator)

if __name__ == "__main__":
    app(prog_name="python -m dispatcher.simulator")
