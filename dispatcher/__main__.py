"""The entry: `dispatcher` and `python -m dispatcher`."""

from dispatcher.cli import app


def main() -> None:
    """Run the command line; ends the process with its exit code."""
    app(prog_name="dispatcher")


if __name__ == "__main__":
    main()
