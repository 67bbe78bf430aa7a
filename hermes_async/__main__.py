"""`python -m hermes_async` is `hermes-async`."""

from hermes_async.cli import main

if __name__ == "__main__":
    main()
