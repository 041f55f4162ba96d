"""python -m medistill."""

from .cli import main

main()
