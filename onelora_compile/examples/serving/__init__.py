"""A server for many adapters of one base: requests for different adapters are computed in one batch.

Run it by `python -m onelora_compile.examples.serving bank.onnx`, or take what is here as the beginning of your own.

fields (what a request gives) -> backends (a bank in ONNX Runtime, a compiled model) -> batcher (requests to batches)
-> app (the routes); in_thread runs it beside other code, client talks to it.
"""
