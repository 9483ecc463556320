"""Studies over runs: the papers' tables and grids of one's own, their cells, records, statistics, formats and pages."""
