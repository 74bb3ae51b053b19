"""Bad calls of the writers, and the ways to make them."""

FORMATS = (
    "'auto', 'fp8', 'fp8_e4m3', 'fp8_e5m2', 'fp8_e4m3fnuz', 'fp8_e5m2fnuz', 'int8', 'int4', 'nvfp4' or 'fp8_ds_mla'"
)
