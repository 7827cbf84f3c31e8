"""Where images come from: folders, archives, tables, buckets, addresses, documents, videos; one module per kind."""
