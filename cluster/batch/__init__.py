"""Batch jobs over long documents: the gRPC service, and what runs jobs out of the journal."""
