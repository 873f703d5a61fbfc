"""The autoscaler: sees pools and workers, asks planner.scaling what to do, and does it."""
