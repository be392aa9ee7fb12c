"""Graph passes: find linear ops, insert rank-1 updates, share their sums, fuse them, fold them away.

Each pass is one file and one function on an `fx.GraphModule` (fold_vectors: on an `ExportedProgram`), usable
alone; `run_passes` is what the backend runs.
"""

from onelora_compile.passes.expand_attention import expand_attention
from onelora_compile.passes.fuse_rank1 import fuse_rank1
from onelora_compile.passes.insert_rank1 import insert_rank1
from onelora_compile.passes.lowerings import LOWERINGS
from onelora_compile.passes.match_linear import LinearSite, match_linear
from onelora_compile.passes.result import PassResult
from onelora_compile.passes.run import PIPELINE, run_passes
from onelora_compile.passes.share_feature_sum import share_feature_sum
from onelora_compile.passes.verify import verify
from onelora_compile.passes.weight_to_activation import weight_to_activation

__all__ = [
    "LOWERINGS",
    "PIPELINE",
    "LinearSite",
    "PassResult",
    "expand_attention",
    "fuse_rank1",
    "insert_rank1",
    "match_linear",
    "run_passes",
    "share_feature_sum",
    "verify",
    "weight_to_activation",
]
