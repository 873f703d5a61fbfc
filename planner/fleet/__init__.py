"""A fleet of workers in virtual time, scaled by the production code of planner.scaling."""
