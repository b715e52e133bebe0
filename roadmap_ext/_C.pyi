from typing import TypedDict

class BuildInfo(TypedDict):
    torch: str
    compiler: str
    cuda: bool
    cuda_reason: str
    cuda_archs: str
    cpu: str
    cpu_available: list[str]

with_cuda: bool
cuda_reason: str

def build_info() -> BuildInfo: ...
