"""How the stages lie over machines: placement, members, the pool and its sessions. Ray; torch only inside members."""

from cluster.environment import prepare_ray

prepare_ray()
