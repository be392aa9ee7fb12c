"""The demo: one pretrained sentence encoder, three tasks, three adapters.

data (the tasks) -> model (MiniLM with a head) -> methods (what each trains and writes) -> train (steps, accuracy)
-> deploy (ONNX, bank, engine, swapping) -> figures, page, report (what is shown); run ties them.
"""
