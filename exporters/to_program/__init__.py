"""From an adapted model to a program of torch.export, and to the files of runtimes that read one."""
