"""What every program does with the module `tensorrt`: a bundle carries this folder, the workstation wraps it.

Python 3.8 and its standard library; the module itself is an argument.  Nothing here knows bundles or manifests.
"""
