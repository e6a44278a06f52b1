"""The stock parts that strategies are made of. Importing this registers them."""

from kvpolicy.parts.decide import EachLine, EachToken, Every
from kvpolicy.parts.least_change import LeastChange
from kvpolicy.parts.moving import MovingMass
from kvpolicy.parts.named import available_parts, register_part
from kvpolicy.parts.observe import WatchAll, WatchFading, WatchLine, WatchNewest, WatchWindow
from kvpolicy.parts.protect import Anchors, RecentLines, RecentShare, RecentTokens
from kvpolicy.parts.score import HeadMean, Mass, PooledMass, Recency, ShortKeys

__all__ = [
    "Anchors",
    "EachLine",
    "EachToken",
    "Every",
    "HeadMean",
    "LeastChange",
    "Mass",
    "MovingMass",
    "PooledMass",
    "Recency",
    "RecentLines",
    "RecentShare",
    "RecentTokens",
    "ShortKeys",
    "WatchAll",
    "WatchFading",
    "WatchLine",
    "WatchNewest",
    "WatchWindow",
    "available_parts",
    "register_part",
]
