"""Ranks methods on a prepared data set: plan, trainings, evaluations, table."""
