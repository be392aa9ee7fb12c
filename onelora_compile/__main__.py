"""`python -m onelora_compile`, as `onelora`."""

from onelora_compile.cli import main

main()
