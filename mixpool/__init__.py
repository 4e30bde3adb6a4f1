"""mixpool: stems of convolutional networks whose channels pool by the maximum or by the modulus."""

from mixpool.conversion.convert import convert, revert
from mixpool.conversion.find import StemError
from mixpool.conversion.initialize import initialize, wavelet_stem
from mixpool.conversion.report import ConversionReport
from mixpool.conversion.stock import stock_state_dict
from mixpool.filters.partner import analytic_filter, analytic_partner, hilbert_partner
from mixpool.ops.functional import mixpool2d
from mixpool.selection.plan import ChannelPlan
from mixpool.selection.stats import FilterStats, analyze
from mixpool.stem.module import BlurPoolStem, CModStem, MixPoolStem, why_not_fused

__version__ = "0.1.0"

__all__ = [
    "BlurPoolStem",
    "CModStem",
    "ChannelPlan",
    "ConversionReport",
    "FilterStats",
    "MixPoolStem",
    "StemError",
    "analytic_filter",
    "analytic_partner",
    "analyze",
    "convert",
    "hilbert_partner",
    "initialize",
    "mixpool2d",
    "revert",
    "stock_state_dict",
    "wavelet_stem",
    "why_not_fused",
]
