"""Graph passes: find linear ops, insert rank-1 updates, share their sums, fuse them, fold them away.

Each pass is one file and one function on an `fx.GraphModule` (fold_vectors: on an `ExportedProgram`), usable
alone; `run_passes` is what the backend runs.
"""

from onelora_compile.passes.fuse_updates import fuse_rank1
from onelora_compile.passes.insert_updates import insert_rank1
from onelora_compile.passes.invariants import verify
from onelora_compile.passes.lowerings import LOWERINGS
from onelora_compile.passes.move_updates import weight_to_activation
from onelora_compile.passes.open_attention import expand_attention
from onelora_compile.passes.result import PassResult
from onelora_compile.passes.run import PIPELINE, pipeline, run_passes
from onelora_compile.passes.share_sums import share_feature_sum
from onelora_compile.passes.sites.linear_site import LinearSite, match_linear

__all__ = [
    "LOWERINGS",
    "PIPELINE",
    "LinearSite",
    "PassResult",
    "expand_attention",
    "fuse_rank1",
    "insert_rank1",
    "match_linear",
    "pipeline",
    "run_passes",
    "share_feature_sum",
    "verify",
    "weight_to_activation",
]
