"""The AUTOMATIC1111 dialect, served under `/sdapi/v1`."""
