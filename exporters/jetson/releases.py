"""What each JetPack ships, and so what its TensorRT takes."""

from __future__ import annotations

import dataclasses

from onelora_compile.errors import ConfigError

# Operators that the ONNX parser of a TensorRT release does not know, from its table docs/operators.md (onnx-tensorrt).
_NEVER = frozenset(
    "Bernoulli BitShift BlackmanWindow Compress ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear "
    "HammingWindow HannWindow MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss "
    "Optional OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul STFT SequenceAt SequenceConstruct "
    "SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence "
    "StringNormalizer TfIdfVectorizer Unique".split()
)
_NEWER = frozenset(  # since opset 18, and later than TensorRT 8
    "AffineGrid Attention BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im DeformConv Gelu ImageDecoder "
    "Mish RMSNormalization RegexFullMatch RotaryEmbedding Swish StringConcat StringSplit TensorScatter".split()
)


@dataclasses.dataclass(frozen=True)
class JetPack:
    """A release of NVIDIA's system for Jetson.

    Attributes:
        version: as its users call it.
        l4t: Jetson Linux.
        tensorrt: the release that it ships.
        python: of the system, for which the module `tensorrt` is made.
        cuda: the toolkit.
        sm: compute capabilities of its boards.
        opset: the newest ONNX opset that its parser takes.
        unknown: operators that its parser does not know.
        strongly_typed: whether the types of the ONNX model are those of the engine.
        weak_typing: whether TensorRT can be left to choose types (`BuilderFlag.FP16`).
        refit_individual: whether single weights can be refitted.
        bfloat16: whether it has it.
    """

    version: str
    l4t: str
    tensorrt: str
    python: str
    cuda: str
    sm: tuple[str, ...]
    opset: int
    unknown: frozenset[str]
    strongly_typed: bool = True
    weak_typing: bool = True
    refit_individual: bool = True
    bfloat16: bool = True

    @property
    def verifies(self) -> bool:
        """Whether its OpenSSL's command verifies ed25519: 3.0 does."""
        return int(self.version.split(".")[0]) >= 6

    @property
    def major(self) -> int:
        """The major version of its TensorRT."""
        return int(self.tensorrt.split(".")[0])


_OLD = {"strongly_typed": False, "refit_individual": False, "bfloat16": False}
_LAYER_NORM = frozenset(["LayerNormalization", "GroupNormalization", "IsInf", "Hardmax", "CastLike"])
JETPACKS = {
    one.version: one
    for one in (
        JetPack("5.1", "35.x", "8.5.2", "3.8", "11.4", ("7.2", "8.7"), 17, _NEVER | _NEWER | _LAYER_NORM, **_OLD),
        JetPack(
            "6.0", "36.3", "8.6.2", "3.10", "12.2", ("8.7",), 17, _NEVER | _NEWER | {"Hardmax", "CastLike"}, **_OLD
        ),
        JetPack("6.1", "36.4", "10.3.0", "3.10", "12.6", ("8.7",), 20, _NEVER),
        JetPack("6.2", "36.4", "10.3.0", "3.10", "12.6", ("8.7",), 20, _NEVER),
        JetPack("7.0", "38.2", "10.13", "3.12", "13.0", ("11.0",), 20, _NEVER),
        JetPack("7.1", "38.4", "10.13", "3.12", "13.0", ("11.0",), 20, _NEVER),
        JetPack("7.2", "39.2", "10.16.2", "3.12", "13.2", ("8.7", "11.0"), 24, _NEVER),
    )
}


def jetpack_of(version: str) -> JetPack:
    """The release of a version: "6.2", also of a point release, "6.2.1".

    Raises:
        ConfigError: an unknown one.
    """
    short = ".".join(str(version).split(".")[:2])
    if short not in JETPACKS:
        raise ConfigError(
            f"jetpack={version!r} is not one of {', '.join(JETPACKS)}. `cat /etc/nv_tegra_release` on the device shows "
            "its L4T release: " + ", ".join(f"{one.l4t} is {one.version}" for one in JETPACKS.values())
        )
    return JETPACKS[short]
