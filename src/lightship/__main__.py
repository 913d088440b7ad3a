"""`python -m lightship` is the command line."""

from lightship.cli import main

if __name__ == "__main__":
    main()
