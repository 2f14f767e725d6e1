"""Vocabulary shared by every layer: requests, jobs, errors. Free of torch and HTTP."""
