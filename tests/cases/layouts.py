"""The layouts in use, written down once more."""

CONSTANTS = {
    "NHD": "block slot head dim",
    "HND": "block head slot dim",
    "HEAD_MAJOR": "block head dim/x slot x, block head dim slot",
    "PALLAS": "head block slot dim",
    "KV_NHD": "kv block slot head dim",
    "BLOCK_KV_NHD": "block kv slot head dim",
    "BLOCK_KV_HND": "block kv head slot dim",
    "PACKED_NHD": "block slot head k+v",
    "PACKED_HND": "block head slot k+v",
    "INTERLEAVED": "block slot (head kv) dim",
}


WITH_LAYER = [", ".join(f"layer {array.strip()}" for array in p.split(",")) for p in CONSTANTS.values()]


VLLM = {
    "LBHNC": "layer block head slot k+v",
    "LBNHC": "layer block slot head k+v",
    "LHBNC": "layer head block slot k+v",
    "BLHNC": "block layer head slot k+v",
    "BLNHC": "block layer slot head k+v",
    "BHLNC": "block head layer slot k+v",
}
"""vLLM's, all of one array for all layers."""
