"""Which device it is: a Gaudi 3, or what FAKEHPU_KIND says (gaudi2)."""

import enum
import os


class synDeviceType(enum.Enum):
    synDeviceGaudi = 1
    synDeviceGaudi2 = 4
    synDeviceGaudi3 = 5


def _get_device_type() -> synDeviceType:
    kind = os.environ.get("FAKEHPU_KIND", "gaudi3")
    return synDeviceType[f"synDevice{kind.capitalize()}"]
