"""`python -m thinkmid` is the `thinkmid` command."""

from thinkmid.cli import entry

if __name__ == "__main__":
    entry()
