"""What GPUs can do, from their makers' data sheets."""

from dataclasses import dataclass

# Shares of the peaks that a step reaches as a rule: of matrix products, of memory bandwidth, of links.
REACHED, REACHED_BANDWIDTH, REACHED_LINK = 0.65, 0.8, 0.7
LATENCY = 6e-6  # seconds that the host takes to start a kernel, about: it is not known before it is measured


@dataclass(frozen=True)
class Device:
    """A GPU: bytes of memory that programs get; dense FLOP/s in bfloat16 (float32 sums), in float32, and of float32 in
    TF32; bytes/s of its memory; and bytes/s of its links to others of the machine, one way."""

    memory: float
    bfloat16: float
    float32: float
    tf32: float
    bandwidth: float
    link: float

    def seconds(self, flops: int, size: int, moved: int) -> float:
        """Return the time of a kernel of `flops` operations on numbers of `size` bytes that moves `moved` bytes."""
        peak = self.bfloat16 if size < 4 else self.float32
        return max(flops / peak / REACHED, moved / self.bandwidth / REACHED_BANDWIDTH, LATENCY)


def free_memory(device: str, processes: int) -> int:
    """Return the free bytes of CUDA's `device` ("auto": the first), or, of those that `processes` use, of the GPU that
    has least. Opens each GPU that it asks, and that takes memory until the process ends."""
    import torch

    index = device.partition(":")[2]
    numbers = [int(index)] if index else [*range(min(processes, torch.cuda.device_count()))]
    return min(torch.cuda.mem_get_info(number)[0] for number in numbers)


GiB = 2**30
# Data sheets: nvidia.com (A100 80GB SXM, H100 SXM, H200 SXM, L40S, Ada architecture whitepaper for the RTX 4090), the
# AWS page of G5 instances (A10G), amd.com (MI300X).
DEVICES = {
    "A100": Device(79.1 * GiB, 312e12, 19.5e12, 156e12, 2.04e12, 300e9),
    "H100": Device(79.6 * GiB, 989e12, 67e12, 494e12, 3.35e12, 450e9),
    "H200": Device(139.8 * GiB, 989e12, 67e12, 494e12, 4.8e12, 450e9),
    "MI300X": Device(191.5 * GiB, 1307e12, 163e12, 653e12, 5.3e12, 448e9),
    "L40S": Device(44.5 * GiB, 362e12, 91.6e12, 183e12, 0.864e12, 32e9),
    "A10G": Device(22.1 * GiB, 70e12, 35e12, 35e12, 0.6e12, 16e9),
    "RTX 4090": Device(23.6 * GiB, 165e12, 82.6e12, 82.6e12, 1.01e12, 32e9),
}
