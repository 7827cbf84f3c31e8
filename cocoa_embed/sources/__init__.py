"""Where images come from: folders, archives, tables, buckets, addresses, documents, videos; one file a kind."""
