"""The command line, a file a command over one Typer app (``app.py``); ``main.py`` is the console script."""
