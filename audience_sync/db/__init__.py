"""The database: engines and transactions, SQL dialects, tables, leases, row loading, migrations."""
