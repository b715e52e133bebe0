from typing import TypedDict

class BuildInfo(TypedDict):
    torch: str
    compiler: str
    cuda_archs: str
    cpu: str
    cpu_available: list[str]

cuda_version: str
cuda_reason: str

def build_info() -> BuildInfo: ...
