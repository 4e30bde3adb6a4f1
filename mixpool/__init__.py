"""mixpool: stems of convolutional networks whose channels pool by the maximum or by the modulus."""

from mixpool.checkpoint import stock_state_dict
from mixpool.convert import convert, revert
from mixpool.filters import FilterStats, analytic_filter, analytic_partner, analyze, hilbert_partner
from mixpool.find import StemError
from mixpool.functional import mixpool2d
from mixpool.layers import BlurPoolStem, CModStem, MixPoolStem
from mixpool.plan import ChannelPlan
from mixpool.report import ConversionReport

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
    "mixpool2d",
    "revert",
    "stock_state_dict",
]
