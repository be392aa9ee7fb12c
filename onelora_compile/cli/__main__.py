"""`python -m onelora_compile.cli`, as `onelora`."""

from onelora_compile.cli.commands import main

main()
