"""The database: engines, dialects, tables, leases, bulk loading of rows, and migrations."""
