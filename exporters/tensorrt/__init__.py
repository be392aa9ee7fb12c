"""TensorRT engines: building, running, refitting them."""
