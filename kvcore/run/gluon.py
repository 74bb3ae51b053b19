"""Whether kernels in Gluon can be launched."""

from kvcore.plan.kernel import Target


def launches_gluon(target: Target) -> bool:
    """Whether kernels in Gluon can be launched on a target."""
    if target.backend != "cuda":
        return False
    from kvcore.run.compiler import has_gluon  # imports Triton

    return has_gluon()
