"""The compiled module: importing it registers the ops with torch. Source: ``csrc/module.cpp``."""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    torch: str
    cuda: str | None
    compiler: str
    cplusplus: int

def build_info() -> BuildInfo: ...
def warning_handler() -> int: ...
def set_warning_handler(handler: int) -> None: ...
def take_not_finite(device_index: int) -> str: ...  # only in a CUDA build
