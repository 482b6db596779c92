"""python -m vitexp [command] [overrides]."""

from vitexp.cli import main

if __name__ == "__main__":
    main()
