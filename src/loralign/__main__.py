"""`python -m loralign` is the command `loralign`."""

from loralign.cli import main

if __name__ == "__main__":
    main()
