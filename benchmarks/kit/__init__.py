"""What several questions share: records, tables, figures, timing, queues, the shared data."""
