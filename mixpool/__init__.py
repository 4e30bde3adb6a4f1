"""mixpool: CNN classifiers that are steady under small shifts of the image."""

from mixpool.conversion.convert import convert, revert
from mixpool.conversion.find import StemError
from mixpool.conversion.initialize import initialize
from mixpool.conversion.stock import stock_state_dict
from mixpool.filters.partner import analytic_partner
from mixpool.ops.functional import mixpool2d
from mixpool.selection.stats import analyze
from mixpool.stem.module import MixPoolStem, why_not_fused

__version__ = "0.2.0.dev0"

__all__ = [
    "MixPoolStem",
    "StemError",
    "analytic_partner",
    "analyze",
    "convert",
    "initialize",
    "mixpool2d",
    "revert",
    "stock_state_dict",
    "why_not_fused",
]
