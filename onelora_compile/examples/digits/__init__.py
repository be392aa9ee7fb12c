"""A small vision transformer, pretrained on digits, adapted to shifted ones.

Run it by `python -m onelora_compile.examples.digits`.

data (the domains) -> model (the transformer) -> methods (what each trains and writes) -> train (steps, accuracy); run
ties them.
"""
