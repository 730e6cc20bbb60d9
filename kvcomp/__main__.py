"""Run the command line: `python -m kvcomp`."""

from kvcomp.cli import main

if __name__ == "__main__":
    main()
