"""Say which adapters of a collection on disk share a basis, and how many bases are worth it."""

from .choose import choose_clusters
from .run import Clustered, ClusterOptions, ClusterReport, cluster

__all__ = ["ClusterOptions", "ClusterReport", "Clustered", "choose_clusters", "cluster"]
