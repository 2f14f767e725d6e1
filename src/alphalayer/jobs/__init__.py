"""The job queue: protocols, one adapter for SQLite and one for PostgreSQL."""
