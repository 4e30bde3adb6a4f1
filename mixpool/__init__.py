"""mixpool: stems of convolutional networks whose channels pool by the maximum or by the modulus."""

from mixpool.checkpoint import stock_state_dict
from mixpool.convert import convert, revert
from mixpool.filters import analytic_filter, analytic_partner, hilbert_partner
from mixpool.find import StemError
from mixpool.functional import mixpool2d
from mixpool.layers import BlurPoolStem, CModStem, MixPoolStem, why_not_fused
from mixpool.plan import ChannelPlan
from mixpool.report import ConversionReport
from mixpool.stats import FilterStats, analyze
from mixpool.wavelet_stem import initialize, wavelet_stem

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
