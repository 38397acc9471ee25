"""``python -m ringasync`` is the ``ringasync`` command."""

from ringasync.cli.main import main

if __name__ == "__main__":
    main()
