"""The container of a bundle: NVIDIA's image with the TensorRT of its JetPack, and the bundle in it."""

from __future__ import annotations

from typing import Any

from onelora_compile.exporters.jetson.releases import JetPack

# L4T images end with JetPack 6.  JetPack 7 takes the images of servers with Arm, which name no JetPack.
IMAGES = {
    "5.1": "nvcr.io/nvidia/l4t-jetpack:r35.4.1",
    "6.0": "nvcr.io/nvidia/l4t-jetpack:r36.3.0",
    "6.1": "nvcr.io/nvidia/l4t-jetpack:r36.4.0",
    "6.2": "nvcr.io/nvidia/l4t-jetpack:r36.4.0",
    "7.0": "nvcr.io/nvidia/tensorrt:25.08-py3",
    "7.1": "nvcr.io/nvidia/tensorrt:25.08-py3",
    "7.2": "nvcr.io/nvidia/tensorrt:26.05-py3",
}
IGNORED = "local\n__pycache__\n"  # of this device; an image is for many


def dockerfile(jetpack: JetPack, manifest: dict[str, Any]) -> str:
    """A Dockerfile; engines are not in the image, as building one needs the GPU, which a build of an image has not."""
    gpu = "--runtime nvidia" + (" --gpus all" if jetpack.version.startswith("7") else "")
    run = f"docker run --rm {gpu} -v model-local:/bundle/local"
    packages = "openssl" if manifest["update_key"] else ""
    updates = [f"#   {run} -v $PWD/new:/new:ro model update /new/c.safetensors"] if manifest["vectors"] else []
    lines = [
        f"# This bundle in a container, for JetPack {jetpack.version}: TensorRT {jetpack.tensorrt}.",
        "# This recipe was not run, and the tag of its image not looked up. On the device, in this folder:",
        "#",
        "#   docker build -t model .",
        f"#   {run} model build",
        f"#   {run} model selftest",
        *updates,
        "#",
        "# The volume keeps engines and adapters of this device: without it both end with the container.",
        "# Another image of this TensorRT: --build-arg BASE=... Without the module tensorrt in it:",
        '# --build-arg PACKAGES="python3-libnvinfer"',
        f"ARG BASE={IMAGES[jetpack.version]}",
        "FROM ${BASE}",
        f'ARG PACKAGES="{packages}"',
        'RUN if [ -n "$PACKAGES" ]; then apt-get update && apt-get install -y --no-install-recommends $PACKAGES \\',
        "    && rm -rf /var/lib/apt/lists/*; fi",
        "WORKDIR /bundle",
        "COPY . .",
        "VOLUME /bundle/local",
        'ENTRYPOINT ["python3", "build_and_run.py"]',
        'CMD ["status"]',
    ]
    return "\n".join([*lines, ""])
