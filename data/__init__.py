"""The data sets' tables, and small modules around a run: prepare, predict, compare, pictures."""
