"""The demo: a small vision transformer, pretrained on digits, adapted to shifted ones by 1LoRA and by others.

data (the domains) -> model (the transformer) -> methods (what each trains and writes) -> train (steps, accuracy)
-> measure (bytes and times) -> deploy (ONNX, swapping) -> figures, page, report (what is shown) ; run ties them.
"""
