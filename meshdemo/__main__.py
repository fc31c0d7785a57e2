"""`python -m meshdemo`: the same as the `meshdemo` script."""

from meshdemo.cli.main import run

if __name__ == "__main__":
    run()
