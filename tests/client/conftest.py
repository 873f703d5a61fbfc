"""Fixtures that the client's tests have in common with those of the router and of whole clusters."""

from tests.cluster.conftest import fake_cluster, prefork
from tests.router.conftest import model_dir

__all__ = ["fake_cluster", "model_dir", "prefork"]
