"""Meshes of H100s on a host without a GPU."""

from pathlib import Path

from jax.experimental import topologies


def h100s(number, shape=None, names=("tp",)):
    """A mesh of H100s, of one axis unless it has another shape."""
    config = (Path(__file__).parents[1] / "compiled" / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x1x{number}")
    return topologies.make_mesh(topology, shape or (number,), names)
