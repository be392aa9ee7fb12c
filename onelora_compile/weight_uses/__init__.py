"""Which weights the code of a model uses, how and how often: found by following the code, without inputs."""
