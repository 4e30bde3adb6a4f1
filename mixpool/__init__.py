"""mixpool: CNN classifiers that are steady under small shifts of the image."""

from mixpool.conversion.convert import convert
from mixpool.conversion.find import StemError
from mixpool.conversion.initialize import initialize
from mixpool.conversion.stock import stock_state_dict
from mixpool.filters.partner import analytic_partner
from mixpool.ops.functional import mixpool2d
from mixpool.selection.stats import analyze
from mixpool.stabilization.files import load_stabilized, save_stabilized
from mixpool.stabilization.repair import repair
from mixpool.stabilization.stabilize import finalize, revert, stabilize
from mixpool.stem.module import MixPoolStem, why_not_fused
from mixpool.version import VERSION

__version__ = VERSION

__all__ = [
    "MixPoolStem",
    "StemError",
    "analytic_partner",
    "analyze",
    "convert",
    "finalize",
    "initialize",
    "load_stabilized",
    "mixpool2d",
    "repair",
    "revert",
    "save_stabilized",
    "stabilize",
    "stock_state_dict",
    "why_not_fused",
]
