from detent.statistics.site import SiteStatistics

__all__ = ["SiteStatistics"]
