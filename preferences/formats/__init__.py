"""Foreign formats of preference data: one file each, and the registry that everything else is made from.

To add one, write its file with a `FORMAT` and name it here.
"""

from .coprov2 import FORMAT as COPROV2
from .format import Format, FoundPair, Source
from .hpdv2 import FORMAT as HPDV2
from .imagefolder import FORMAT as IMAGEFOLDER
from .invoke import FORMAT as INVOKE
from .kohya import FORMAT as KOHYA
from .onetrainer import FORMAT as ONETRAINER
from .pick_safety import FORMAT as PICK_SAFETY
from .pickapic import FORMAT as PICKAPIC
from .simpletuner import FORMAT as SIMPLETUNER
from .trl import FORMAT as TRL

__all__ = ["FORMATS", "Format", "FoundPair", "Source"]

FORMATS: dict[str, Format] = {
    "coprov2": COPROV2,
    "pickapic": PICKAPIC,
    "pick-safety": PICK_SAFETY,
    "trl": TRL,
    "hpdv2": HPDV2,
    "invoke": INVOKE,
    "kohya": KOHYA,
    "simpletuner": SIMPLETUNER,
    "onetrainer": ONETRAINER,
    "imagefolder": IMAGEFOLDER,
}
