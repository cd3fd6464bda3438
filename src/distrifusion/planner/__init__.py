"""What a configuration will cost, from integers alone. No torch: a plan can be made where no model is loaded."""

from .anatomy import Anatomy, Context, Conv, Crossing, Joint, Norm, Seam, Sums, Total, Upsampling
from .traffic import Traffic, traffic

__all__ = [
    "Anatomy",
    "Context",
    "Conv",
    "Crossing",
    "Joint",
    "Norm",
    "Seam",
    "Sums",
    "Total",
    "Traffic",
    "Upsampling",
    "traffic",
]
