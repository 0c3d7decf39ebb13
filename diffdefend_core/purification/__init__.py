"""Purification: removal loss on the triggered, retention loss on the normal distribution, no real data."""

from diffdefend_core.purification.losses import Removal
from diffdefend_core.purification.repair import Repair, repair

__all__ = ["Removal", "Repair", "repair"]
