"""How wide the accesses of compiled kernels are that copy, for GPUs of several kinds."""

import re

from kvcore.plan.kernel import Target

TARGETS = {
    "sm_80": Target("cuda", 80),
    "sm_90": Target("cuda", 90),
    "sm_100": Target("cuda", 100),
    "gfx942": Target("hip", "gfx942", 64),
}


def accesses(kernel):
    """Widths in bits of (loads, stores); loads of 32 bits, of pairs, are left out."""
    if "ptx" in kernel.asm:
        found = re.findall(r"(ld|st)\.global(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
        widths = {(op, int(vector or 1) * int(bits)) for op, vector, bits in found}
    else:
        found = re.findall(
            r"(?:global|buffer)_(load|store)_(dwordx4|dwordx3|dwordx2|dword|ushort|short|ubyte|byte)",
            kernel.asm["amdgcn"],
        )
        size = {
            "dwordx4": 128,
            "dwordx3": 96,
            "dwordx2": 64,
            "dword": 32,
            "ushort": 16,
            "short": 16,
            "ubyte": 8,
            "byte": 8,
        }
        widths = {(op[:2].replace("lo", "ld"), size[width]) for op, width in found}
    return {w for op, w in widths if op == "ld" and w > 32}, {w for op, w in widths if op == "st"}
