"""mixpool: stems of convolutional networks whose channels pool by the maximum or by the modulus."""

from mixpool.filters import FilterStats, analytic_filter, analytic_partner, analyze, hilbert_partner
from mixpool.functional import mixpool2d
from mixpool.layers import BlurPoolStem, CModStem, MixPoolStem
from mixpool.plan import ChannelPlan

__version__ = "0.1.0"
