"""`python -m lorazip_cli`."""

from .main import run

run()
