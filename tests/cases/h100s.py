"""Meshes of H100s on a host without a GPU."""

from pathlib import Path

from jax._src.lib.mlir import ir
from jax.experimental import topologies


def h100s(number, shape=None, names=("tp",)):
    """A mesh of H100s, of one axis unless it has another shape."""
    config = (Path(__file__).parents[1] / "compiled" / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x1x{number}")
    return topologies.make_mesh(topology, shape or (number,), names)


def put(lowered, arguments, results):
    """Puts arguments and results of a lowered program into memories of these kinds, which H100s here do not know."""
    module = lowered.compiler_ir("stablehlo")
    with module.context:
        (main,) = (op for op in module.body.operations if str(op.attributes["sym_name"]) == '"main"')
        for name, kinds in (("arg_attrs", arguments), ("res_attrs", results)):
            every = []
            for attributes, kind in zip(main.attributes[name], kinds, strict=True):
                entries = {item.name: item.attr for item in attributes}
                every.append(ir.DictAttr.get(entries | {"mhlo.memory_kind": ir.StringAttr.get(kind)}))
            main.attributes[name] = ir.ArrayAttr.get(every)
    return lowered
